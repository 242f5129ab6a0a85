"""What a run begins with or goes on with: what is said, what is refused, and by which name."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from tiny import tiny_config

from ssd_fast.checkpoints.checkpoint import BEST, CheckpointError, load_checkpoint, numbered_path
from ssd_fast.config.recipe import is_dumped
from ssd_fast.training.run import train
from ssd_fast.training.scores import read_scores

STEPS = 16  # of the finished run


def test_a_run_is_not_overwritten(finished: Path, synthetic_set: Path) -> None:
    with pytest.raises(CheckpointError, match=r"finished: holds a run already: expected another --output, or --resume"):
        train(tiny_config(), synthetic_set, finished, resume=False)
    assert is_dumped(finished / "config.toml")


def test_a_run_of_other_classes_or_another_model_cannot_be_resumed(
    finished: Path, synthetic_set: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(finished), str(copy)], check=True)
    with pytest.raises(CheckpointError, match=r"model\.extra_channels = .*expected the same"):
        train(
            tiny_config(("training.epochs=3", "model.extra_channels=[[16, 32], [16, 32], [16, 64]]")),
            synthetic_set,
            copy,
            resume=True,
        )
    with pytest.raises(CheckpointError, match="has other classes"):
        train(tiny_config(("training.epochs=3", 'data.classes=["checkered disc"]')), synthetic_set, copy, resume=True)


def give_classes_other_ids(data: Path) -> None:
    """In the same order: labels stay."""
    for path in (data / "annotations").iterdir():
        content = json.loads(path.read_text())
        for entry, key in [(x, "id") for x in content["categories"]] + [
            (x, "category_id") for x in content["annotations"]
        ]:
            entry[key] *= 10
        path.write_text(json.dumps(content))


def test_what_else_has_changed_since_a_run_began_is_said(
    finished: Path, synthetic_set: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy, data = tmp_path / "copy", tmp_path / "data"
    for source, target in ((finished, copy), (synthetic_set, data)):
        subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    with pytest.raises(CheckpointError, match=r"copy: its run has training\.batch_size = 8: expected the same, not 4"):
        train(tiny_config(("training.epochs=3", "training.batch_size=4")), data, copy, resume=True)
    annotations = data / "annotations" / "instances_val2017.json"
    content = json.loads(annotations.read_text())
    content["annotations"].pop()
    annotations.write_text(json.dumps(content))
    give_classes_other_ids(data)
    scores_file = copy / "scores.json"
    kept = json.loads(scores_file.read_text())
    kept["epochs"]["1"]["map"] = 0.99  # on the set of before
    scores_file.write_text(json.dumps(kept))
    outcome = train(tiny_config(("training.epochs=3",)), data, copy, resume=True)
    assert "instances_val2017.json differs from the validation set of the scores so far" in caplog.text
    scores = read_scores(scores_file, until_epoch=3)
    assert scores.by_epoch[1]["map"] == 0.99
    assert outcome.best_map == scores.best_map == scores.by_epoch[3]["map"] < 0.9
    assert load_checkpoint(copy / "checkpoints" / BEST).step == 24
    caplog.clear()
    assert train(tiny_config(("training.epochs=3",)), data, copy, resume=True).best_map == outcome.best_map
    assert "differs" not in caplog.text


@pytest.mark.parametrize("key", ["training.batch_size", "training.seed"])
def test_what_orders_the_images_is_compared_before_the_sets_are_read(finished: Path, tmp_path: Path, key: str) -> None:
    with pytest.raises(CheckpointError, match=rf"finished: its run has {key} = \d+: expected the same, not 4"):
        train(tiny_config(("training.epochs=3", f"{key}=4")), tmp_path / "no data", finished, resume=True)


def test_a_run_with_no_place_is_refused_before_the_sets_are_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    for output in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ValueError, match=rf"--output {output}: .*file is a file: expected a folder"):
            train(tiny_config(), tmp_path / "no data", output, resume=False)
    assert (tmp_path / "file").read_bytes() == b"old"


def test_an_initial_checkpoint_that_is_missing_or_does_not_fit_is_named(
    finished: Path, synthetic_set: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"model\.initial_checkpoint = 'nowhere\.pt': no such file"):
        train(tiny_config(("model.initial_checkpoint=nowhere.pt",)), tmp_path / "no data", tmp_path / "a", resume=False)
    initial = f"model.initial_checkpoint={finished / 'checkpoints' / BEST}"
    other = "model.extra_channels=[[16, 32], [16, 32], [16, 64]]"
    with pytest.raises(ValueError, match=rf"initial_checkpoint = '.*{BEST}': 2 entries of the state dict do not fit"):
        train(tiny_config((initial, other)), synthetic_set, tmp_path / "b", resume=False)


def test_a_detector_of_other_classes_is_fine_tuned_and_its_classes_are_named(
    finished: Path, synthetic_set: Path, tmp_path: Path
) -> None:
    initial = f"model.initial_checkpoint={finished / 'checkpoints' / BEST}"
    classes = 'data.classes=["checkered disc", "striped bar"]'
    output = tmp_path / "run"
    train(tiny_config((initial, classes, "optimizer.learning_rate=1e-9")), synthetic_set, output, resume=False)
    kept = "classes kept by name: checkered disc, striped bar; not used: dotted triangle"
    assert kept in (output / "train.log").read_text()
    old, new = load_checkpoint(finished / "checkpoints" / BEST), load_checkpoint(output / "checkpoints" / BEST)
    assert [category.name for category in new.categories] == ["checkered disc", "striped bar"]
    assert new.model["class_heads.0.weight"].shape[0] * 2 == old.model["class_heads.0.weight"].shape[0]
    torch.testing.assert_close(new.model["box_heads.0.weight"], old.model["box_heads.0.weight"], rtol=1e-4, atol=1e-6)


def test_a_finished_run_of_an_earlier_version_is_known_by_the_scores_in_its_checkpoint(
    finished: Path, synthetic_set: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(finished), str(copy)], check=True)
    path = numbered_path(copy / "checkpoints", STEPS)
    scores = read_scores(copy / "scores.json", until_epoch=2)
    content = torch.load(path, weights_only=True)
    torch.save(content | {"format": "ssd_fast checkpoint 2", "scores": scores.by_epoch}, path)
    (copy / "scores.json").unlink()
    assert train(tiny_config(), synthetic_set, copy, resume=True).best_map == scores.best_map
    assert [item.name for item in (copy / "checkpoints").iterdir() if item.name.startswith("step")] == [path.name]
