"""The detector at 1200x1200: its anchors, and the way to it from one at 300x300."""

import logging
import math
from pathlib import Path

import pytest
import torch
from repository import REPOSITORY
from tiny import tiny_config

from ssd_fast.checkpoints.checkpoint import load_checkpoint
from ssd_fast.config.recipe import load_config
from ssd_fast.data.synthesize import KINDS, synthesize
from ssd_fast.model.anchors import model_anchors
from ssd_fast.model.ssd import SSD
from ssd_fast.training.run import train

CONFIGS = REPOSITORY / "configs"
STRIDE_3 = ("model.image_size=192", "model.head_stride=3", "model.anchor_steps=[24, 48, 96, 192]")
"""The tiny network at three times the size, on the same grids of 8, 4, 2 and 1 cells."""


def test_anchors_are_those_of_the_mlperf_reference() -> None:
    expected = []
    grids, cells_per_image = (50, 25, 13, 7, 3, 3), (50, 25, 13, 7, 3, 3)  # the reference's 1200 // step
    scales = [4 * scale for scale in (21, 45, 99, 153, 207, 261, 315)]
    for level, (grid, cells) in enumerate(zip(grids, cells_per_image, strict=True)):
        small, large = scales[level] / 1200, scales[level + 1] / 1200
        shapes = [(small, small), (math.sqrt(small * large),) * 2]
        for ratio in [2, 3] if 1 <= level <= 3 else [2]:
            long, short = small * math.sqrt(ratio), small / math.sqrt(ratio)
            shapes += [(long, short), (short, long)]
        for row in range(grid):
            for column in range(grid):
                centre = ((column + 0.5) / cells, (row + 0.5) / cells)
                expected += [[min(max(value, 0), 1) for value in (*centre, *shape)] for shape in shapes]
    assert len(expected) == 15130
    anchors = model_anchors(load_config(CONFIGS / "ssd1200.toml").model)
    torch.testing.assert_close(anchors, torch.tensor(expected), rtol=0, atol=1e-6)


def test_fine_tuning_is_of_the_benchmarks_network() -> None:
    benchmark, fine_tuned = (load_config(CONFIGS / f"{name}.toml").model for name in ("ssd1200", "ssd1200_finetune"))
    assert fine_tuned.initial_checkpoint is not None
    assert fine_tuned.model_copy(update={"initial_checkpoint": None}) == benchmark
    assert benchmark.grid_sizes() == (50, 25, 13, 7, 3, 3)


def test_a_detector_of_small_images_goes_on_at_large_ones(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    synthesize(tmp_path / "data", num_images=10, seed=0)
    torch.manual_seed(0)
    small = SSD(tiny_config().model, num_classes=len(KINDS))
    torch.save({"model": small.state_dict()}, tmp_path / "small.pth")
    changes = (
        f"model.initial_checkpoint={tmp_path / 'small.pth'}",
        "training.epochs=1",
        "optimizer.decay_epochs=[]",
        "optimizer.learning_rate=1e-12",  # so that what was loaded can be told
    )
    with caplog.at_level(logging.INFO):
        train(tiny_config((*STRIDE_3, *changes)), tmp_path / "data", tmp_path / "large", resume=False)
    large = load_checkpoint(tmp_path / "large" / "checkpoints" / "best.pt")
    assert large.config.model.grid_sizes() == small.config.grid_sizes() == (8, 4, 2, 1)
    assert "anew" not in caplog.text
    for name, parameter in small.named_parameters():
        torch.testing.assert_close(large.model[name], parameter.detach(), rtol=0, atol=1e-6, msg=name)
    assert not torch.equal(large.model["backbone.bn1.running_mean"], small.state_dict()["backbone.bn1.running_mean"])
