"""The command line on real files: what it prints and writes, and how it refuses."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from repository import REPOSITORY
from tiny import TINY, tiny_config

from ssd_fast.__main__ import main
from ssd_fast.checkpoints.checkpoint import load_checkpoint
from ssd_fast.evaluation.coco_eval import format_scores, read_results, score
from ssd_fast.training.run import train

SSD300 = str(REPOSITORY / "configs" / "ssd300.toml")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `ssd-fast ARGUMENTS` in this process: exit status, stdout, stderr."""

    def run_main(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ssd-fast", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_info:
            main()
        code = exit_info.value.code
        out, err = capsys.readouterr()
        if isinstance(code, str):  # Python itself prints it and exits with 1
            return 1, out, err + code + "\n"
        return int(code or 0), out, err

    return run_main


@pytest.fixture(scope="module")
def checkpoint(synthetic_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The best checkpoint of a run that has learned a little."""
    output = tmp_path_factory.mktemp("cli") / "run"
    changes = ("training.epochs=6", "optimizer.decay_epochs=[]", "optimizer.learning_rate=0.02", "evaluation.epochs=[]")
    train(tiny_config(changes), synthetic_set, output, resume=False)
    return output / "checkpoints" / "best.pt"


def test_evaluate_prints_the_numbers_of_the_detections_it_writes(
    run: Run, checkpoint: Path, synthetic_set: Path, tmp_path: Path
) -> None:
    results = tmp_path / "detections.json"
    options = ("--checkpoint", checkpoint, "--data", synthetic_set, "--output", results, "--per-class")
    status, out, _ = run("evaluate", *options)
    assert status == 0
    annotations = synthetic_set / "annotations" / "instances_val2017.json"
    oracle = score(annotations, read_results(results), evaluator="pycocotools")
    assert out == format_scores(oracle, per_class=True) + "\n"
    assert out.count("Average") == 12


def test_evaluation_after_training_and_by_command_agree(run: Run, checkpoint: Path, synthetic_set: Path) -> None:
    _, out, _ = run("evaluate", "--checkpoint", checkpoint, "--data", synthetic_set)
    recorded = [json.loads(line) for line in (checkpoint.parent.parent / "metrics.jsonl").read_text().splitlines()]
    best = max((record for record in recorded if record["kind"] == "eval"), key=lambda record: record["map"])
    assert f"all | maxDets=100 ] = {best['map']:.3f}" in out


def test_detect_writes_an_annotated_copy_of_every_image_and_one_json(
    run: Run, checkpoint: Path, synthetic_set: Path, tmp_path: Path
) -> None:
    images = sorted((synthetic_set / "val2017").iterdir())[:3]
    rotated = tmp_path / "rotated.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(images[0]) as image:
        width, height = image.size
        image.save(rotated, exif=exif)
    output = tmp_path / "out"
    options = ["--checkpoint", checkpoint, "--output", output, "--drawn-score", "0.05"]
    status, out, _ = run("detect", *options, *images, rotated)
    assert status == 0
    (count, seconds, rate) = re.findall(r"^(\d+) images in ([\d.]+) s, ([\d.]+) a second \(", out, re.MULTILINE)[0]
    assert (count, float(rate)) == ("4", pytest.approx(4 / float(seconds), rel=1e-3))
    results = json.loads((output / "detections.json").read_text())
    assert [Path(result["file"]).name for result in results] == [*(path.name for path in images), "rotated.jpg"]
    assert (results[0]["width"], results[0]["height"]) == (width, height)
    assert (results[3]["width"], results[3]["height"]) == (height, width)
    annotations = json.loads((synthetic_set / "annotations" / "instances_val2017.json").read_text())
    names = {category["name"] for category in annotations["categories"]}
    assert sum(len(result["detections"]) for result in results) > 0
    for result in results:
        with Image.open(output / result["annotated"]) as copy:
            assert copy.size == (result["width"], result["height"])
        scores = [detection["score"] for detection in result["detections"]]
        assert scores == sorted(scores, reverse=True)
        assert {detection["category"] for detection in result["detections"]} <= names
    with Image.open(output / results[0]["annotated"]) as copy, Image.open(images[0]) as original:
        drawn = np.abs(np.asarray(copy, int) - np.asarray(original.convert("RGB"), int)).max()
    assert drawn > 100


def test_images_of_the_same_name_get_copies_of_their_own(
    run: Run, checkpoint: Path, synthetic_set: Path, tmp_path: Path
) -> None:
    image = min((synthetic_set / "val2017").iterdir())
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.jpg").write_bytes(image.read_bytes())
    status, _, _ = run(
        "detect", "--checkpoint", checkpoint, "--output", tmp_path / "out", tmp_path / "a", tmp_path / "b"
    )
    assert status == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"same.jpg", "same_2.jpg", "detections.json"}


def test_set_changes_the_checkpoints_own_recipe(
    run: Run, checkpoint: Path, synthetic_set: Path, tmp_path: Path
) -> None:
    results = tmp_path / "detections.json"
    options = ("evaluate", "--checkpoint", checkpoint, "--data", synthetic_set, "--output", results)
    run(*options)
    many = len(read_results(results).scores)
    run(*options, "--set", "detection.max_detections=2")
    assert 0 < len(read_results(results).scores) <= 32 < many


def test_synthesize_makes_a_set_and_refuses_to_overwrite_it(run: Run, tmp_path: Path) -> None:
    status, out, _ = run("synthesize", tmp_path / "data", "--images", "5", "--seed", "3")
    assert status == 0
    assert "5 images" in out
    assert len(list((tmp_path / "data" / "train2017").iterdir())) == 4
    status, _, err = run("synthesize", tmp_path / "data", "--images", "5")
    assert status == 1
    assert str(tmp_path / "data") in err.splitlines()[-1]


def failing_train(run: Run, data: Path, output: Path, *options: str) -> str:
    """The one line that a training command which must fail prints."""
    sets = [part for change in TINY for part in ("--set", change)]
    recipe = str(REPOSITORY / "configs" / "demo.toml")
    status, _, err = run("train", "--config", recipe, "--data", data, "--output", output, *sets, *options)
    assert status == 1
    assert "Traceback" not in err
    last = err.splitlines()[-1]
    assert last.startswith("error: ")
    return last


def test_a_mistyped_recipe_is_refused_before_anything_is_written(run: Run, synthetic_set: Path, tmp_path: Path) -> None:
    line = failing_train(run, synthetic_set, tmp_path / "run", "--set", "training.epoch=3")
    assert "training.epoch = 3: unknown key" in line
    assert not (tmp_path / "run").exists()


def test_missing_data_is_refused_before_anything_is_written(run: Run, tmp_path: Path) -> None:
    line = failing_train(run, tmp_path / "nowhere", tmp_path / "run")
    assert "instances_train2017.json: no such file: expected COCO instances" in line
    assert not (tmp_path / "run").exists()


def test_a_set_without_boxes_cannot_be_trained_on(run: Run, synthetic_set: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    subprocess.run(["cp", "-r", str(synthetic_set), str(data)], check=True)
    annotations = data / "annotations" / "instances_train2017.json"
    annotations.write_text(json.dumps(json.loads(annotations.read_text()) | {"annotations": []}))
    assert "no image has a box to learn from" in failing_train(run, data, tmp_path / "run")


def test_an_output_folder_that_cannot_be_made_is_refused(run: Run, synthetic_set: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file, not a folder")
    assert f"{tmp_path / 'file'}" in failing_train(run, synthetic_set, tmp_path / "file" / "run")


def test_an_unwritable_output_folder_is_refused(run: Run, synthetic_set: Path) -> None:
    output = Path("/sys/ssd_fast_run")  # where not even the superuser may make a folder
    assert re.search(
        rf"{output}: /sys cannot be written to: (Operation not permitted|Permission denied)",
        failing_train(run, synthetic_set, output),
    )


def test_a_bad_image_ends_the_run_or_is_left_out_as_the_recipe_says(
    run: Run, synthetic_set: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    subprocess.run(["cp", "-r", str(synthetic_set), str(data)], check=True)
    victim = min((data / "train2017").iterdir())
    victim.write_bytes(victim.read_bytes()[:-100])
    line = failing_train(run, data, tmp_path / "run")
    assert f"{victim.name}: cannot be decoded" in line
    assert 'data.bad_images = "skip"' in line
    train(
        tiny_config(("data.bad_images=skip", "training.epochs=1", "optimizer.decay_epochs=[]")),
        data,
        tmp_path / "ok",
        resume=False,
    )
    assert "63 images" in (tmp_path / "ok" / "train.log").read_text()
    assert "1 bad images left out" in (tmp_path / "ok" / "train.log").read_text()


def test_a_checkpoint_of_another_model_is_refused(run: Run, checkpoint: Path, synthetic_set: Path) -> None:
    status, _, err = run("evaluate", "--checkpoint", checkpoint, "--data", synthetic_set, "--config", SSD300)
    assert status == 1
    assert "best.pt" in err
    assert "extras.0.0.weight is float32 [16, 256, 1, 1]: expected float32 [256, 256, 1, 1]" in err


def test_a_data_set_without_the_checkpoints_classes_is_refused(
    run: Run, checkpoint: Path, synthetic_set: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    subprocess.run(["cp", "-r", str(synthetic_set), str(data)], check=True)
    annotations = data / "annotations" / "instances_val2017.json"
    annotations.write_text(annotations.read_text().replace("striped bar", "zebra"))
    status, _, err = run("evaluate", "--checkpoint", checkpoint, "--data", data)
    assert status == 1
    assert "lacks the categories ['striped bar']: expected all of" in err


REFERENCE_NAMES = {
    "backbone.conv1": "model.layer1.0",
    "backbone.bn1": "model.layer1.1",
    "backbone.layer1": "model.layer1.4",
    "backbone.layer2": "model.layer1.5",
    "backbone.layer3": "model.layer2.0",
    "extras": "additional_blocks",
    "box_heads": "loc",
    "class_heads": "conf",
}


def to_reference_layout(state: dict[str, torch.Tensor], boxes_per_cell: int) -> dict[str, torch.Tensor]:
    """Weights as the MLPerf reference keeps them: other names, and heads with their boxes innermost."""
    converted = {}
    for name, tensor in state.items():
        ours = next(prefix for prefix in REFERENCE_NAMES if name.startswith(prefix + "."))
        if "heads" in ours:
            tensor = tensor.unflatten(0, (boxes_per_cell, -1)).transpose(0, 1).flatten(0, 1)
        converted[REFERENCE_NAMES[ours] + name.removeprefix(ours)] = tensor
    return converted


@pytest.mark.parametrize("arguments", [["--help"], ["scaling", "--help"], ["profile"]])
def test_a_closed_standard_output_ends_quietly(arguments: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "ssd_fast", *arguments]
    ended = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert ended.returncode in (0, 1)
    assert "Traceback" not in ended.stderr
    assert "Exception" not in ended.stderr


def test_a_full_disk_under_standard_output_is_one_line() -> None:
    command = [sys.executable, "-m", "ssd_fast", "scaling", "--help"]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: ")
    assert ended.stderr.endswith("No space left on device\n")
    assert ended.stderr.count("\n") == 1


def test_weights_of_the_mlperf_reference_serve_with_a_recipe_and_class_names(
    run: Run, checkpoint: Path, synthetic_set: Path, tmp_path: Path
) -> None:
    _, expected, _ = run("evaluate", "--checkpoint", checkpoint, "--data", synthetic_set)
    weights, recipe = tmp_path / "weights.pth", checkpoint.parent.parent / "config.toml"
    torch.save({"model": to_reference_layout(load_checkpoint(checkpoint).model, boxes_per_cell=4)}, weights)
    status, found, _ = run("evaluate", "--checkpoint", weights, "--data", synthetic_set, "--config", recipe)
    assert (status, found) == (0, expected)
    image = min((synthetic_set / "val2017").iterdir())
    detect = ("detect", "--checkpoint", weights, "--output", tmp_path / "out", image, "--config", recipe)
    status, _, err = run(*detect)
    assert status == 1
    assert "weights.pth: holds weights of 5 classes without their names: expected COCO's 80, or an annotation" in err
    status, _, _ = run(*detect, "--annotations", synthetic_set / "annotations" / "instances_val2017.json")
    assert status == 0


def test_evaluation_of_other_category_ids_goes_by_name(
    run: Run, checkpoint: Path, synthetic_set: Path, tmp_path: Path
) -> None:
    _, expected, _ = run("evaluate", "--checkpoint", checkpoint, "--data", synthetic_set)
    data = tmp_path / "data"
    subprocess.run(["cp", "-r", str(synthetic_set), str(data)], check=True)
    annotations = data / "annotations" / "instances_val2017.json"
    content = json.loads(annotations.read_text())
    for category in content["categories"]:
        category["id"] = 1000 - category["id"]
    for annotation in content["annotations"]:
        annotation["category_id"] = 1000 - annotation["category_id"]
    annotations.write_text(json.dumps(content))
    status, found, _ = run("evaluate", "--checkpoint", checkpoint, "--data", data)
    assert (status, found) == (0, expected)


def test_help_and_config_errors_do_not_wait_for_torch() -> None:
    code = "import sys, ssd_fast.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=REPOSITORY).returncode == 0
