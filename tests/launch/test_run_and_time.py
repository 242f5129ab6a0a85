"""run_and_time.sh: the parts of a timed evaluation add up, and the exit status tells whether the target was reached."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from repository import REPOSITORY
from timed_report import printed_seconds
from tiny import tiny_config

from ssd_fast.config.recipe import dump_toml
from ssd_fast.data.coco import load_coco
from ssd_fast.model.ssd import SSD

SCRIPT = REPOSITORY / "run_and_time.sh"
PARTS = ("load", "pre-processing", "model", "decoding and NMS", "collecting", "scoring")


@pytest.fixture(scope="module")
def folder(synthetic_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the download scripts leave it, with random weights and a recipe."""
    folder = tmp_path_factory.mktemp("benchmark run")
    (folder / "coco").symlink_to(synthetic_set)
    config = tiny_config(("evaluation.batch_size=4",))
    (folder / "tiny.toml").write_text(dump_toml(config))
    num_classes = len(json.loads((synthetic_set / "annotations/instances_val2017.json").read_text())["categories"])
    torch.manual_seed(0)
    (folder / "pretrained").mkdir()
    torch.save(SSD(config.model, num_classes).state_dict(), folder / "pretrained" / "resnet34-ssd1200.pth")
    return folder


def run_script(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        [str(SCRIPT), *arguments],
        cwd=folder,
        env={**os.environ, "PATH": path, "CONFIG": "tiny.toml", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_the_script_prints_parts_that_add_up_and_the_twelve_numbers(folder: Path) -> None:
    run = run_script(folder, "7", "0", BATCH_SIZE="3")
    assert run.returncode == 0, run.stderr
    seconds = printed_seconds(run.stdout)
    assert list(seconds) == [*PARTS, "total"]
    assert seconds["total"] == round(sum(seconds[part] for part in PARTS), 3)
    assert seconds["load"] > 0
    assert seconds["model"] > 0
    assert "16 images in 6 batches of 3" in run.stdout
    (rate,) = re.findall(r"^([\d.]+) images/s in all", run.stdout, re.MULTILINE)
    assert float(rate) == pytest.approx(16 / seconds["total"], rel=1e-3)
    assert run.stdout.count("Average") == 12
    assert re.search(r"^mAP 0\.\d{5}, target 0: reached$", run.stdout, re.MULTILINE)
    assert (folder / "run.log.7").read_text() == run.stdout


def test_the_exit_status_says_that_the_target_was_missed(folder: Path) -> None:
    annotations = json.loads((folder / "coco" / "annotations" / "instances_val2017.json").read_text())["annotations"]
    num_annotated = len({annotation["image_id"] for annotation in annotations})
    assert num_annotated < 16
    run = run_script(folder, "1", "0.9", "--only-annotated")
    assert run.returncode == 1, run.stderr
    assert re.search(r"^mAP 0\.\d{5}, target 0\.9: not reached$", run.stdout, re.MULTILINE)
    assert f"{num_annotated} images in 4 batches of 4" in run.stdout


def test_errors_have_a_status_of_their_own(folder: Path, tmp_path: Path) -> None:
    for arguments, environment, message in (
        (("x",), {}, "SEED = x: expected a whole number"),
        (("1", "high"), {}, "TARGET = high: expected a COCO mAP"),
        ((), {"DATASET_DIR": "nowhere"}, "nowhere: no such folder: expected COCO (./download_dataset.sh)"),
        ((), {"CHECKPOINT": "none.pth"}, "none.pth: no such file: expected weights (./download_model.sh)"),
        (("1", "0.2"), {"CONFIG": "none.toml"}, "error: none.toml: no such recipe"),
    ):
        run = run_script(folder, *arguments, **environment)
        assert run.returncode == 2
        assert message in run.stderr
        assert "Average" not in run.stdout
    assert "TARGET (default: 0.20)" in run_script(folder, "--help").stdout


def test_images_without_annotations_are_left_out_only_when_asked(synthetic_set: Path, tmp_path: Path) -> None:
    annotations = shutil.copy(synthetic_set / "annotations" / "instances_val2017.json", tmp_path)
    content = json.loads(Path(annotations).read_text())
    bare, crowded = (image["id"] for image in content["images"][:2])
    kept = [item for item in content["annotations"] if item["image_id"] != bare]
    content["annotations"] = [item | {"iscrowd": 1} if item["image_id"] == crowded else item for item in kept]
    Path(annotations).write_text(json.dumps(content))

    def ids(only_annotated: bool) -> list[int]:
        found = load_coco(Path(annotations), synthetic_set / "val2017", only_annotated=only_annotated)
        return found.images.image_ids.tolist()

    everything = [image["id"] for image in content["images"]]
    assert ids(False) == everything
    annotated = {item["image_id"] for item in kept}
    assert crowded in annotated
    assert ids(True) == [image_id for image_id in everything if image_id in annotated]
