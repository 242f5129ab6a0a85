"""What a run resumes from, and whether a configuration and data fit it."""

import logging
from typing import NamedTuple

from ssd_fast.checkpoints.checkpoint import Checkpoint, CheckpointError, newest_checkpoint, set_aside_damaged
from ssd_fast.config.recipe import is_dumped
from ssd_fast.config.sections import Config
from ssd_fast.data.coco import CocoSet
from ssd_fast.data.sets import TrainAndVal
from ssd_fast.files import check_folder, remove_leftovers
from ssd_fast.training.folder import RunFolder
from ssd_fast.training.scores import Scores, read_scores

logger = logging.getLogger(__name__)

_MUST_STAY = ("training.batch_size", "training.seed")  # the order of images follows from them
_MAY_CHANGE = ("model.backbone_weights", "model.initial_checkpoint")  # keys of the model that a resumed run ignores


class Saved(NamedTuple):
    """The state that a run resumes from."""

    checkpoint: Checkpoint
    scores: Scores


def open_run(folder: RunFolder, *, resume: bool) -> Saved | None:
    """The state to resume from, in a folder that is claimed where it is a run's.

    Raises ValueError when a new run would overwrite another or has no place, and when another process uses the folder.
    """
    if is_dumped(folder.recipe):
        folder.claim()
    checkpoint = newest_checkpoint(folder.checkpoints)
    if not resume and (checkpoint or folder.metrics.exists()):
        raise CheckpointError(
            f"{folder.path}: holds a run already: expected another --output, or --resume to go on with it"
        )
    is_run = checkpoint is not None or is_dumped(folder.recipe)
    check_folder(folder.path, "--output", folder.results(), lambda _: is_run)
    remove_leftovers(folder.path)
    remove_leftovers(folder.checkpoints)
    set_aside_damaged(folder.checkpoints, checkpoint)
    folder.interrupted.unlink(missing_ok=True)
    folder.new_detections.unlink(missing_ok=True)
    if checkpoint is None:
        return None
    if checkpoint.scores:  # a run of an earlier version, which had no file of scores
        return Saved(checkpoint, Scores(checkpoint.scores))
    return Saved(checkpoint, read_scores(folder.scores, until_epoch=checkpoint.step // checkpoint.steps_per_epoch))


def check_config(saved: Checkpoint, config: Config, folder: RunFolder) -> None:
    """Raise CheckpointError where a configuration does not fit a run."""
    for key, old, new in _differences(saved.config, config):
        if key in _MUST_STAY or (key.startswith("model.") and key not in _MAY_CHANGE):
            raise CheckpointError(f"{folder.path}: its run has {key} = {old!r}: expected the same, not {new!r}")


def check_classes(saved: Checkpoint, train_set: CocoSet, folder: RunFolder) -> None:
    """Raise CheckpointError where a training set has other classes, by name, than a run."""
    old, new = ([item.name for item in categories] for categories in (saved.categories, train_set.categories))
    if old != new:
        raise CheckpointError(
            f"{folder.path}: its run has other classes than {train_set.annotation_file}: {old}: expected the same, "
            f"not {new}"
        )


def announce_changes(saved: Saved, config: Config, sets: TrainAndVal, folder: RunFolder) -> None:
    """Warn of keys that differ from those that the run began with, and of a validation set that does."""
    for key, old, new in _differences(saved.checkpoint.config, config):
        logger.warning("the run in %s began with %s = %r; it continues with %r", folder.path, key, old, new)
    scores = saved.scores
    if scores.val_set and scores.val_set != sets.val.digest():
        scores.compare_after(max(scores.by_epoch, default=0))
        logger.warning(
            "%s differs from the validation set of the scores so far: mAPs before and after cannot be compared, and "
            "the best is the best of those that follow",
            sets.val.annotation_file,
        )


def _differences(old: Config, new: Config) -> list[tuple[str, object, object]]:
    """Keys (section.key) in which two configurations differ, with both values."""
    before, after = old.model_dump(), new.model_dump()
    return [
        (f"{section}.{key}", value, after[section][key])
        for section, keys in before.items()
        for key, value in keys.items()
        if value != after[section][key]
    ]
