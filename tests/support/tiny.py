"""A run small enough to be repeated in tests."""

from collections.abc import Sequence
from pathlib import Path

import torch
from repository import REPOSITORY

from ssd_fast.checkpoints.checkpoint import Checkpoint, load_checkpoint, numbered_path, save_checkpoint
from ssd_fast.config.recipe import load_config
from ssd_fast.config.sections import Config
from ssd_fast.data.annotations import Category
from ssd_fast.training.history import read_metrics

TINY = (
    "model.image_size=64",
    "model.extra_channels=[[16, 32], [16, 32], [16, 32]]",
    "model.extra_strides=[2, 2, 2]",
    "model.extra_paddings=[1, 1, 1]",
    "model.anchor_steps=[8, 16, 32, 64]",
    "model.anchor_scales=[6, 12, 24, 36, 56]",
    "model.aspect_ratios=[[2], [2], [2], [2]]",
    "data.num_threads=2",
    "optimizer.warmup_steps=2",
    "optimizer.decay_epochs=[2]",
    "training.precision=fp32",
    "training.epochs=2",
    "training.batch_size=8",
    "training.log_every_steps=3",
    "evaluation.epochs=[1]",
    "evaluation.batch_size=8",
    "augmentation.crop_sides=[0.3, 1.0]",
    "optimizer.learning_rate=0.04",
)
"""Overrides of configs/demo.toml: 8 steps an epoch on the 64 training images of the synthetic set. The precision is
named, so that every machine computes the same."""


def tiny_config(overrides: Sequence[str] = ()) -> Config:
    """The recipe of a run of seconds."""
    return load_config(REPOSITORY / "configs" / "demo.toml", [*TINY, *overrides])


def save_weights(path: Path, config: Config, categories: tuple[Category, ...], model: torch.nn.Module) -> None:
    """A checkpoint of a network that was not trained."""
    save_checkpoint(path, Checkpoint(config, categories, model.state_dict(), {}, {}, {}, [], [], 0, 1))


def final_state(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Weights, momentum, and BatchNorm's statistics, also of each rank, at the end of a run."""
    checkpoint = load_checkpoint(numbered_path(run / "checkpoints", step))
    momentum = {f"momentum {i}": s["momentum_buffer"] for i, s in checkpoint.optimizer["state"].items()}
    return checkpoint.model | momentum | {f"rank {rank}": own for rank, own in enumerate(checkpoint.statistics)}


def assert_same_end(one: Path, other: Path, step: int) -> None:
    """Two runs end with the same state, bit by bit, and the same losses and scores on the way."""
    states = final_state(one, step), final_state(other, step)
    assert states[0].keys() == states[1].keys()
    assert [name for name in states[0] if not torch.equal(states[0][name], states[1][name])] == []
    records = [
        sorted(read_metrics(run / "metrics.jsonl"), key=lambda record: (record["step"], record["kind"]))
        for run in (one, other)  # a score is recorded when it is there
    ]
    for record in records[0] + records[1]:
        record.pop("images_per_second", None)
    assert records[0] == records[1]
