"""A run small enough to be repeated in tests."""

from collections.abc import Sequence

from conftest import REPOSITORY

from ssd_fast.config import Config, load_config

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
    "training.epochs=2",
    "training.batch_size=8",
    "training.log_every_steps=3",
    "evaluation.epochs=[1]",
    "evaluation.batch_size=8",
    "augmentation.crop_sides=[0.3, 1.0]",
    "optimizer.learning_rate=0.04",
)
"""Overrides of configs/demo.toml: 8 steps an epoch on the 64 training pictures of the synthetic set."""


def tiny_config(overrides: Sequence[str] = ()) -> Config:
    """The recipe of a run of seconds."""
    return load_config(REPOSITORY / "configs" / "demo.toml", [*TINY, *overrides])
