"""A training run: from a recipe and a data folder to checkpoints, records and images."""

import logging
from functools import partial
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch

from ssd_fast.checkpoints.checkpoint import (
    Checkpoint,
    CheckpointError,
    newest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from ssd_fast.checkpoints.finetuning import load_for_finetuning
from ssd_fast.checkpoints.weights import load_backbone_weights
from ssd_fast.config.recipe import dump_toml, is_dumped
from ssd_fast.config.sections import Config
from ssd_fast.data.coco import CocoSet
from ssd_fast.data.loaders import make_eval_loader, make_train_loader
from ssd_fast.data.sets import Reading, TrainAndVal, load_sets
from ssd_fast.distributed.launch import connect
from ssd_fast.distributed.world import World
from ssd_fast.evaluation.detector import Detector
from ssd_fast.files import check_folder, remove_leftovers, write_atomically
from ssd_fast.hardware import compute_dtype
from ssd_fast.model.anchors import model_anchors
from ssd_fast.model.ssd import SSD
from ssd_fast.progress import setup_logging
from ssd_fast.training.folder import RunFolder
from ssd_fast.training.loop import Flags, Loop, Window
from ssd_fast.training.records import Records
from ssd_fast.training.scores import Scores, read_scores
from ssd_fast.training.signals import StopRequest
from ssd_fast.training.step import TrainStep
from ssd_fast.training.validation import Validation

logger = logging.getLogger(__name__)

_MUST_STAY = ("training.batch_size", "training.seed")  # the order of images follows from them
_MAY_CHANGE = ("model.backbone_weights", "model.initial_checkpoint")  # keys of the model that a resumed run ignores


class Outcome(NamedTuple):
    """The end of a run.

    stopped_by: number of the signal that stopped it, 0 for none. best_map: -1 before the first evaluation.
    is_main: true on rank 0, which speaks for all ranks.
    """

    stopped_by: int
    best_map: float
    reached_target: bool
    is_main: bool


class Saved(NamedTuple):
    """The state that a run resumes from."""

    checkpoint: Checkpoint
    scores: Scores


class _RankState(NamedTuple):
    """A rank's own part of a checkpoint. weights_digest must be the same on all ranks."""

    statistics: torch.Tensor
    loader: torch.Tensor
    losses: torch.Tensor
    weights_digest: str


def train(config: Config, data_dir: Path, output: Path, *, resume: bool, reading: Reading | None = None) -> Outcome:
    """Train as a configuration says; everything about the run goes to a folder.

    data_dir: in the layout that the recipe names, by default COCO's.
    output: made if missing. With `resume`, the run in it continues from its newest readable checkpoint, exactly as if
    it had not been interrupted; without a checkpoint it begins.
    reading: of the data, where it has been started.
    Every rank of a parallel launch calls this function; only rank 0 reads and writes the folder.
    Raises ValueError (configuration, data, checkpoint), FloatingPointError (loss) and OSError.
    """
    folder = RunFolder(output)
    with connect(config.distributed) as world, StopRequest() as stop:
        setup_logging(None)
        saved = world.broadcast(_open(folder, resume=resume) if world.is_main else None)
        if saved:
            checkpoint = saved.checkpoint
            if _is_finished(config, checkpoint.steps_per_epoch, checkpoint.step, saved.scores):
                logger.info("%s: this run is finished, at step %d", output, checkpoint.step)
                return _outcome(config, saved.scores, 0, world)
            if len(checkpoint.loader) != world.size:
                raise CheckpointError(
                    f"{output}: a run of {len(checkpoint.loader)} processes: expected as many to resume it, "
                    f"not {world.size}"
                )
            _check_config(checkpoint, config, folder)
        elif (initial := config.model.initial_checkpoint) and not Path(initial).is_file():
            raise ValueError(f"model.initial_checkpoint = {initial!r}: no such file")
        sets = load_sets(config, data_dir, world, reading)
        if world.is_main:
            folder.checkpoints.mkdir(parents=True, exist_ok=True)
            if not folder.recipe.exists():  # it tells the folder of a run
                write_atomically(folder.recipe, dump_toml(config).encode())
            setup_logging(folder.log)
        with Run(config, sets, folder, saved, world) as run:
            return run.train(stop)


class Run:
    """The epoch loop of a run. Its trainer, loop, input and validation know their own state."""

    def __init__(self, config: Config, sets: TrainAndVal, folder: RunFolder, saved: Saved | None, world: World) -> None:
        self.config = config
        self.sets = sets
        self.folder = folder
        self.world = world
        device = world.device()
        self.records = Records(folder, config, world, device)
        logger.info("training on %s", sets.train.describe())
        logger.info("validating on %s", sets.val.describe())
        scores = saved.scores if saved else Scores()
        if saved:
            _check_classes(saved.checkpoint, sets.train, folder)
            for key, old, new in _differences(saved.checkpoint.config, config):
                logger.warning("the run in %s began with %s = %r; it continues with %r", folder.path, key, old, new)
            if scores.val_set and scores.val_set != sets.val.digest():
                scores.compare_after(max(scores.by_epoch, default=0))
                logger.warning(
                    "%s differs from the validation set of the scores so far: mAPs before and after cannot be "
                    "compared, and the best is the best of those that follow",
                    sets.val.annotation_file,
                )
        scores.val_set = sets.val.digest()

        dtype = compute_dtype(config.training.precision, device)
        model = _initial_model(config, sets, world, fresh=saved is None)
        self.train_step = TrainStep(
            model, config.optimizer, device=device, dtype=dtype, world=world, distributed=config.distributed
        )
        anchors_cxcywh = model_anchors(config.model)
        input_state = bytes(saved.checkpoint.loader[world.rank].numpy()) if saved else None
        self.train_loader = make_train_loader(config, sets.train, anchors_cxcywh, device, world, input_state)
        self.loop = Loop(self.train_step, config, steps_per_epoch=self.train_loader.steps_per_epoch)
        detector = Detector(
            model,
            anchors_cxcywh.to(device),
            detection=config.detection,
            categories=sets.train.categories,
            dtype=dtype,
        )
        epochs = config.training.epochs
        self.evaluation_epochs = {epochs, *(epoch for epoch in config.evaluation.epochs if epoch < epochs)}
        self.validation = Validation(
            detector,
            sets.val,
            make_eval_loader(config, sets.val.images, device, world=world),
            world,
            folder,
            epochs=self.evaluation_epochs,
            scores=scores,
            timeout_s=config.distributed.timeout_s,
        )
        self.stopped_by = 0
        if saved:
            self.train_step.load_state_dict(saved.checkpoint._asdict(), saved.checkpoint.statistics[world.rank])
            self.loop.load_state_dict(saved.checkpoint._asdict(), world.rank)
            logger.info("%s: resumes after step %d", folder.path, self.loop.step)
        if world.is_main:
            write_atomically(folder.recipe, dump_toml(config).encode())
        self.records.open_history(self.loop.step if saved else None, self.validation.scores.by_epoch)

    def train(self, stop: StopRequest) -> Outcome:
        """Train until the last epoch, the target, or a request to stop."""
        self.records.begin(
            train_samples=int(np.count_nonzero(np.diff(self.sets.train.images.offsets))),
            eval_samples=len(self.sets.val.images.file_names),
            evaluation_epochs=self.evaluation_epochs,
            resumed_epoch=self.loop.epoch if self.loop.step else None,
        )
        with self.records.display():
            while not self._is_over():
                if self.loop.is_at_epoch_end and self.validation.is_due(self.loop.epoch - 1):
                    self._end_epoch(self.loop.epoch - 1)  # the run was cut off between its last step and its score
                else:
                    self._train_epoch(stop)
        scores = self.validation.scores
        outcome = _outcome(self.config, scores, 0 if self._is_finished() else self.stopped_by, self.world)
        self.records.mlperf.run_stop(success=outcome.reached_target)
        if self.world.is_main and outcome.stopped_by:
            reason = f"signal {outcome.stopped_by}, step {self.loop.step}\n"
            write_atomically(self.folder.interrupted, reason.encode())
        elif self.world.is_main:
            from ssd_fast.training.summary import draw_summary  # matplotlib, which the other ranks do without

            draw_summary(self.folder, self.sets.val, self.sets.train.categories, scores)
        return outcome

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.train_loader.close()
        self.validation.close()
        self.records.close()

    def _train_epoch(self, stop: StopRequest) -> None:
        """Train the rest of an epoch and end it, or return when the run is over, after a checkpoint."""
        epoch, loop, every_steps = self.loop.epoch, self.loop, self.config.training.checkpoint_every_steps
        self.records.begin_epoch(epoch, loop.steps_per_epoch, start_step=loop.step % loop.steps_per_epoch)
        for done in loop.steps(self.train_loader.epoch(), partial(self._flags, stop)):
            if done.window:
                self._report_window(done.window)
            self.stopped_by = done.agreed.stop_signal
            if 0 < done.agreed.scored_epoch == self.validation.pending_epoch:
                self._take_score()
            if self.stopped_by or (every_steps and loop.step % every_steps == 0):
                self._save()
            if self.stopped_by:
                logger.info("stopped by signal %d after step %d; --resume continues here", self.stopped_by, loop.step)
            if self._is_over():
                return
        self.records.mlperf.epoch_stop(epoch)
        self._end_epoch(epoch)

    def _flags(self, stop: StopRequest) -> Flags:
        return Flags(stop_signal=stop.received, scored_epoch=self.validation.scored_epoch())

    def _report_window(self, window: Window) -> None:
        """Record the losses of a window of steps; raise FloatingPointError when too many are not finite."""
        losses, loop = window.losses, self.loop
        if losses.num_nonfinite:
            what = (
                f"the loss was not finite in {losses.num_nonfinite} of the last {window.num_steps} steps, last at step "
                f"{losses.last_nonfinite_step} (learning rate {loop.learning_rate(losses.last_nonfinite_step):.4g})"
            )
            allowed = self.config.training.max_nonfinite_steps
            if losses.longest_nonfinite > allowed:
                raise FloatingPointError(
                    f"{what}: {losses.longest_nonfinite} in a row, more than training.max_nonfinite_steps = {allowed}; "
                    "a lower learning rate or a longer warm-up may help"
                )
            logger.warning("%s; those steps were skipped", what)
        self.records.add_window(
            window, step=loop.step, steps_per_epoch=loop.steps_per_epoch, images_per_step=loop.global_batch_size
        )

    def _is_finished(self) -> bool:
        return _is_finished(self.config, self.loop.steps_per_epoch, self.loop.step, self.validation.scores)

    def _is_over(self) -> bool:
        return self.stopped_by != 0 or self._is_finished()

    def _end_epoch(self, epoch: int) -> None:
        """Evaluate after an epoch where that is due, and save; wait for the score of the last epoch."""
        last = epoch == self.config.training.epochs
        if self.validation.is_due(epoch):
            self._take_score()
            self.records.mlperf.eval_start(epoch)
            with self.train_step.averaged_statistics():
                self.validation.start(epoch)
        if epoch % self.config.training.checkpoint_every_epochs == 0 or epoch in self.evaluation_epochs or last:
            self._save()
        if last:
            self._take_score()

    def _take_score(self) -> None:
        """Wait for the score of the pending evaluation, if there is one, and record it."""
        if not self.validation.pending_epoch:
            return
        scored = self.validation.take()
        step = scored.epoch * self.loop.steps_per_epoch
        if self.world.is_main:
            self.records.add_score(scored, step)
            self.validation.keep(scored, step)

    def _save(self) -> None:
        """Write a checkpoint. The score of an earlier step is waited for: a run resumed from here would lack it."""
        step = self.loop.step
        if self.validation.pending_epoch * self.loop.steps_per_epoch != step:
            self._take_score()
        own = _RankState(
            self.train_step.running_statistics.cpu().clone(),
            torch.frombuffer(bytearray(self.train_loader.state()), dtype=torch.uint8),
            self.loop.unread_losses(),
            self.train_step.weights_digest(),
        )
        ranks = self.world.gather(own)
        with self.train_step.averaged_statistics():
            if ranks:
                self._write_checkpoint(step, ranks)

    def _write_checkpoint(self, step: int, ranks: list[_RankState]) -> None:
        digests = [rank.weights_digest for rank in ranks]
        if len(set(digests)) > 1:
            raise CheckpointError(f"step {step}: weights differ between ranks: {digests}")
        if self.world.size > 1:
            logger.info("step %d: weights of all %d ranks: %s", step, self.world.size, digests[0])
        checkpoint = Checkpoint(
            config=self.config,
            categories=self.sets.train.categories,
            **self.train_step.state_dict(),
            statistics=[rank.statistics for rank in ranks],
            loader=[rank.loader for rank in ranks],
            losses=[rank.losses for rank in ranks],
            **self.loop.state_dict(),
        )
        save_checkpoint(self.folder.checkpoint(step), checkpoint)
        prune_checkpoints(self.folder.checkpoints, self.config.training.keep_checkpoints)


def _open(folder: RunFolder, *, resume: bool) -> Saved | None:
    """The state to resume from. Raises ValueError when a new run would overwrite another or has no place."""
    checkpoint = newest_checkpoint(folder.checkpoints)
    if not resume and (checkpoint or folder.metrics.exists()):
        raise CheckpointError(
            f"{folder.path}: holds a run already: expected another --output, or --resume to go on with it"
        )
    is_run = checkpoint is not None or is_dumped(folder.recipe)
    check_folder(folder.path, "--output", folder.results(), lambda _: is_run)
    remove_leftovers(folder.path)
    remove_leftovers(folder.checkpoints)
    folder.interrupted.unlink(missing_ok=True)
    folder.new_detections.unlink(missing_ok=True)
    if checkpoint is None:
        return None
    if checkpoint.scores:  # a run of an earlier version, which had no file of scores
        return Saved(checkpoint, Scores(checkpoint.scores))
    return Saved(checkpoint, read_scores(folder.scores, until_epoch=checkpoint.step // checkpoint.steps_per_epoch))


def _check_config(saved: Checkpoint, config: Config, folder: RunFolder) -> None:
    """Raise CheckpointError where a configuration does not fit a run."""
    for key, old, new in _differences(saved.config, config):
        if key in _MUST_STAY or (key.startswith("model.") and key not in _MAY_CHANGE):
            raise CheckpointError(f"{folder.path}: its run has {key} = {old!r}: expected the same, not {new!r}")


def _check_classes(saved: Checkpoint, train_set: CocoSet, folder: RunFolder) -> None:
    """Raise CheckpointError where a training set has other classes, by name, than a run."""
    old, new = ([item.name for item in categories] for categories in (saved.categories, train_set.categories))
    if old != new:
        raise CheckpointError(
            f"{folder.path}: its run has other classes than {train_set.annotation_file}: {old}: expected the same, "
            f"not {new}"
        )


def _initial_model(config: Config, sets: TrainAndVal, world: World, *, fresh: bool) -> SSD:
    """The network as a new run begins with it, the same on all ranks; for a resumed one, with any weights."""
    torch.manual_seed(config.training.seed)
    model = SSD(config.model, num_classes=len(sets.train.categories))
    if fresh:
        if world.is_main:
            _load_initial_weights(model, config, [category.name for category in sets.train.categories])
        model.load_state_dict(world.broadcast(model.state_dict()))
    return model


def _load_initial_weights(model: SSD, config: Config, classes: list[str]) -> None:
    initial = config.model.initial_checkpoint
    if initial is None:
        load_backbone_weights(model, config.model.backbone_weights)
        return
    try:
        adapted = load_for_finetuning(model, Path(initial), classes)
    except ValueError as error:
        raise ValueError(f"model.initial_checkpoint = {initial!r}: {error}") from None
    logger.info("%s: %s", initial, adapted.describe())


def _is_finished(config: Config, steps_per_epoch: int, step: int, scores: Scores) -> bool:
    if _has_reached_target(config, scores):
        return True
    last_step = config.training.epochs * steps_per_epoch
    return step > last_step or (step == last_step and config.training.epochs in scores.by_epoch)


def _has_reached_target(config: Config, scores: Scores) -> bool:
    return scores.best_map >= config.evaluation.target_map


def _outcome(config: Config, scores: Scores, stopped_by: int, world: World) -> Outcome:
    return Outcome(stopped_by, scores.best_map, _has_reached_target(config, scores), world.is_main)


def _differences(old: Config, new: Config) -> list[tuple[str, object, object]]:
    """Keys (section.key) in which two configurations differ, with both values."""
    before, after = old.model_dump(), new.model_dump()
    return [
        (f"{section}.{key}", value, after[section][key])
        for section, keys in before.items()
        for key, value in keys.items()
        if value != after[section][key]
    ]
