"""Checkpoints: all that a run needs to resume exactly, and all that a detector needs to be used."""

import io
import logging
import re
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ssd_fast.checkpoints.weights import read_torch_file
from ssd_fast.config.recipe import ConfigError, validate_config
from ssd_fast.config.sections import Config
from ssd_fast.data.annotations import Category
from ssd_fast.files import sync_folder, unfinished, write_atomically

logger = logging.getLogger(__name__)

FORMAT = "ssd_fast checkpoint 3"
_FORMAT_WITH_SCORES = "ssd_fast checkpoint 2"
BEST = "best.pt"
_NUMBERED = re.compile(r"step_(\d{9})\.pt")


class CheckpointError(ValueError):
    """A file that is damaged, or does not hold a checkpoint of this program; the message names the file."""


class Checkpoint(NamedTuple):
    """A run at one step boundary.

    config, categories: of the run. model: state dict of ssd_fast.model.ssd.SSD.
    optimizer, scaler, rng: their state dicts; rng holds torch's generators.
    model's BatchNorm statistics are the means of all ranks'; statistics holds each rank's own, one [N] float32 each.
    loader: state of the input pipeline of each rank, one uint8 tensor each.
    step: steps done. scores: the twelve COCO numbers by epoch (from 1), of a file of format 2 only.
    losses: of each rank, [W, 3] of the W steps since they were last averaged; none in a file of an earlier version.
    nonfinite_in_a_row: steps before those whose loss was not finite.
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
    scores: dict[int, dict[str, float]] = {}  # noqa: RUF012 — never changed
    losses: list[torch.Tensor] = []  # noqa: RUF012
    nonfinite_in_a_row: int = 0


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint under a temporary name and rename it: the file appears only when it is complete.

    Raises OSError that names the file if the disk is full or the folder is not writable; an older file then stays.
    """
    values = {name: value for name, value in checkpoint._asdict().items() if name != "scores"} | {
        "format": FORMAT,
        "config": checkpoint.config.model_dump(mode="json", exclude_none=True),
        "categories": [category._asdict() for category in checkpoint.categories],
    }
    buffer = io.BytesIO()  # the error of torch.save on a full disk does not say that the disk is full
    torch.save(values, buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getbuffer())


def load_checkpoint(path: Path) -> Checkpoint:
    """Return a checkpoint, on the CPU. The file is read as data: no code in it runs.

    Raises CheckpointError if the file is damaged, also on the disk, or not a checkpoint of this program, and OSError if
    it cannot be read for another reason, and MemoryError; all name the file.
    """
    try:
        content = read_torch_file(path)
        if not is_checkpoint(content):
            raise CheckpointError(f"{path}: not a checkpoint of this program: expected format = {FORMAT!r}")
        return parse_checkpoint(content, path)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    except MemoryError as error:
        reason = str(error)
        raise MemoryError(reason if str(path) in reason else f"{path}: not enough memory to read it") from None


def is_checkpoint(content: Any) -> bool:
    """Return True for the content of a checkpoint of this program, of any version, and False for weights alone."""
    return isinstance(content, dict) and "format" in content


def parse_checkpoint(content: dict[str, Any], path: Path) -> Checkpoint:
    """Return the checkpoint in the content of a file.

    Raises CheckpointError, too, where a part of the file does not fit its checksum, which torch does not look at.
    """
    if part := _damaged_part(path):
        raise CheckpointError(f"{path}: damaged: {part} does not fit its checksum")
    if content["format"] not in (FORMAT, _FORMAT_WITH_SCORES):
        raise CheckpointError(f"{path}: format = {content['format']!r}: expected {FORMAT!r}")
    try:
        config = validate_config(content["config"], source=str(path))
    except ConfigError as error:
        raise CheckpointError(f"{path}: its configuration is not valid here: {error}") from None
    categories = tuple(Category(**category) for category in content["categories"])
    values = {name: content[name] for name in Checkpoint._fields if name in content}
    return Checkpoint(**values | {"config": config, "categories": categories})


def numbered_path(folder: Path, step: int | None) -> Path:
    """Return the path of the checkpoint after a number of steps; None for a pattern of all such paths."""
    return folder / ("step_*.pt" if step is None else f"step_{step:09d}.pt")


def copy_checkpoint(source: Path, target: Path) -> None:
    """Make target the same file as source, without copying where the file system has hard links."""
    link = unfinished(target)
    link.unlink(missing_ok=True)
    try:
        link.hardlink_to(source)
    except OSError:
        write_atomically(target, source.read_bytes())
    else:
        link.replace(target)
        sync_folder(target.parent)


def _damaged_part(path: Path) -> str | None:
    """Name of the first part of a file of torch.save, a zip archive, that does not fit its checksum."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip()
    except zipfile.BadZipFile as error:
        return str(error)


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """Return the undamaged checkpoint of the highest step, or None. Damaged ones are skipped with a warning.

    Raises OSError that names the file where one cannot be read, as on a server that is away: it may be whole.
    """
    for path in _numbered(folder):
        try:
            return load_checkpoint(path)
        except CheckpointError as error:
            logger.warning("%s; trying the one before", error)
    return None


def set_aside_damaged(folder: Path, readable: Checkpoint | None) -> None:
    """Rename the checkpoints after the newest one that is readable: they must not count as the newest.

    Raises CheckpointError where none is readable.
    """
    damaged = _numbered(folder)
    if readable:
        damaged = [path for path in damaged if path.name > numbered_path(folder, readable.step).name]
    elif damaged:
        raise CheckpointError(
            f"{folder}: none of its checkpoints can be read: expected one to resume from; to begin anew, take another "
            "--output"
        )
    for path in damaged:
        path.rename(path.with_name(f"{path.name}.damaged"))


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Delete all but the newest numbered checkpoints. The best checkpoint has another name and stays."""
    for path in _numbered(folder)[keep:]:
        path.unlink()


def _numbered(folder: Path) -> list[Path]:
    """Return the numbered checkpoints of a folder, newest first; none if there is no folder."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NUMBERED.fullmatch(path.name)), reverse=True)
