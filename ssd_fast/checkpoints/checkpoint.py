"""Checkpoints: everything that a run needs to go on exactly, or that a model needs to be used."""

import io
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ssd_fast.checkpoints.weights import read_torch_file
from ssd_fast.config import Config
from ssd_fast.data.coco import Category
from ssd_fast.files import write_atomically
from ssd_fast.recipe import ConfigError, validate_config

logger = logging.getLogger(__name__)

FORMAT = "ssd_fast checkpoint 2"
BEST = "best.pt"
_NUMBERED = re.compile(r"step_(\d{9})\.pt")


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written, or is not of this program; the message names the file."""


class Checkpoint(NamedTuple):
    """A run at one step boundary.

    config, categories: of the run. model: state dict of ssd_fast.model.ssd.SSD.
    optimizer, scaler, rng: their state dicts; rng holds torch's generators.
    model's BatchNorm statistics are the means of all ranks'; statistics holds each rank's own, one [N] float32 each.
    loader: state of the input pipeline of each rank, one uint8 tensor each.
    step: steps done. scores: the twelve COCO numbers of each evaluated epoch (from 1), by epoch.
    """

    config: Config
    categories: tuple[Category, ...]
    model: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    rng: dict[str, Any]
    statistics: list[torch.Tensor]
    loader: list[torch.Tensor]
    step: int
    steps_per_epoch: int
    scores: dict[int, dict[str, float]]


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Writes a checkpoint under a temporary name and renames it: the file is whole or is not there.

    Raises OSError that names the file when the disk is full or the folder cannot be written to; an older file stays.
    """
    values = checkpoint._asdict() | {
        "format": FORMAT,
        "config": checkpoint.config.model_dump(mode="json", exclude_none=True),
        "categories": [category._asdict() for category in checkpoint.categories],
    }
    buffer = io.BytesIO()  # torch.save straight to a full disk fails with an error that does not say so
    torch.save(values, buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getbuffer())


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint onto the CPU, as data only (no code in it is run).

    Raises CheckpointError when the file is missing, damaged, or not a checkpoint of this program.
    """
    try:
        content = read_torch_file(path)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    if not is_checkpoint(content):
        raise CheckpointError(f"{path}: not a checkpoint of this program: expected format = {FORMAT!r}")
    return parse_checkpoint(content, path)


def is_checkpoint(content: Any) -> bool:
    """Whether what a file holds is a checkpoint of this program, of any version, rather than weights alone."""
    return isinstance(content, dict) and "format" in content


def parse_checkpoint(content: dict[str, Any], path: Path) -> Checkpoint:
    """The checkpoint that a file holds; path is named in errors."""
    if content["format"] != FORMAT:
        raise CheckpointError(f"{path}: format = {content['format']!r}: expected {FORMAT!r}")
    try:
        config = validate_config(content["config"], source=str(path))
    except ConfigError as error:
        raise CheckpointError(f"{path}: its configuration is not valid here: {error}") from None
    categories = tuple(Category(**category) for category in content["categories"])
    values = {name: content[name] for name in Checkpoint._fields}
    return Checkpoint(**values | {"config": config, "categories": categories})


def numbered_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is kept."""
    return folder / f"step_{step:09d}.pt"


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The readable checkpoint of the highest step, or None; damaged ones are passed over with a warning."""
    for path in _numbered(folder):
        try:
            return load_checkpoint(path)
        except CheckpointError as error:
            logger.warning("%s; trying the one before", error)
    return None


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Removes all but the newest numbered checkpoints; the best one is kept under a name of its own."""
    for path in list(_numbered(folder))[keep:]:
        path.unlink()


def _numbered(folder: Path) -> Iterator[Path]:
    """Numbered checkpoints of a folder, newest first."""
    if folder.is_dir():
        yield from sorted((path for path in folder.iterdir() if _NUMBERED.fullmatch(path.name)), reverse=True)
