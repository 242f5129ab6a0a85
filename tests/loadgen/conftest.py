"""The command `benchmark`, run in this process, and weights that detect well on a set whose order is unusual."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from short_benchmark import MANY, load_set
from tiny import tiny_config

from ssd_fast.__main__ import main
from ssd_fast.data.loaders import make_eval_loader
from ssd_fast.distributed.world import World
from ssd_fast.evaluation.detector import make_random_detector

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `ssd-fast benchmark ARGUMENTS` in this process: exit status, stdout, stderr."""

    def run_main(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ssd-fast", "benchmark", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_info:
            main()
        code = exit_info.value.code
        out, err = capsys.readouterr()
        return (1, out, err + code) if isinstance(code, str) else (int(code or 0), out, err)

    return run_main


@pytest.fixture(scope="session")
def shuffled_set(synthetic_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The synthetic set with its images and its categories in another order than that of their ids."""
    directory = tmp_path_factory.mktemp("loadgen") / "data"
    (directory / "annotations").mkdir(parents=True)
    (directory / "val2017").symlink_to(synthetic_set / "val2017")
    content = json.loads((synthetic_set / "annotations" / "instances_val2017.json").read_text())
    content["images"] = content["images"][::2] + content["images"][1::2]
    content["categories"].reverse()
    (directory / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    return directory


@pytest.fixture(scope="session")
def weights(shuffled_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, which detect well: their best detections become the ground truths of the set."""
    annotations = shuffled_set / "annotations" / "instances_val2017.json"
    config, device, coco_set = tiny_config([MANY]), torch.device("cpu"), load_set(shuffled_set)
    detector = make_random_detector(config, coco_set.categories, device)
    table = detector.detect_set(make_eval_loader(config, coco_set.images, device), coco_set, World())
    content = json.loads(annotations.read_text())
    best = [np.flatnonzero(table.image_ids == image["id"])[:20:4] for image in content["images"]]
    content["annotations"] = [
        {"id": row + 1, "image_id": image_id, "category_id": category_id, "bbox": box, "area": box[2] * box[3]}
        for row, image_id, category_id, box in zip(
            np.concatenate(best).tolist(),
            *(column[np.concatenate(best)].tolist() for column in (table.image_ids, table.category_ids)),
            table.boxes_xywh[np.concatenate(best)].tolist(),
            strict=True,
        )
    ]
    annotations.write_text(json.dumps(content))
    path = tmp_path_factory.mktemp("weights") / "weights.pt"
    torch.save(detector.model.state_dict(), path)
    return path
