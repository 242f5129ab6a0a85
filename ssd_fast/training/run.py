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
    prune_checkpoints,
    save_checkpoint,
)
from ssd_fast.checkpoints.finetuning import load_for_finetuning
from ssd_fast.checkpoints.weights import load_backbone_weights
from ssd_fast.config.recipe import dump_toml
from ssd_fast.config.sections import Config
from ssd_fast.data.loaders import make_eval_loader, make_train_loader
from ssd_fast.data.sets import Reading, TrainAndVal, load_sets
from ssd_fast.distributed.launch import connect
from ssd_fast.distributed.world import World
from ssd_fast.evaluation.detector import Detector
from ssd_fast.files import write_atomically
from ssd_fast.hardware import compute_dtype
from ssd_fast.model.anchors import model_anchors
from ssd_fast.model.ssd import SSD
from ssd_fast.progress import setup_logging
from ssd_fast.training.folder import RunFolder
from ssd_fast.training.loop import Flags, Loop, Window
from ssd_fast.training.records import Records
from ssd_fast.training.resume import Saved, announce_changes, check_classes, check_config, open_run
from ssd_fast.training.scores import Scores
from ssd_fast.training.signals import StopRequest
from ssd_fast.training.step import TrainStep
from ssd_fast.training.validation import Validation

logger = logging.getLogger(__name__)


class Outcome(NamedTuple):
    """The end of a run.

    stopped_by: number of the signal that stopped it, 0 for none. best_map: -1 before the first evaluation.
    is_main: true on rank 0, which speaks for all ranks.
    """

    stopped_by: int
    best_map: float
    reached_target: bool
    is_main: bool


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
    with connect(config.distributed) as world, StopRequest() as stop, RunFolder(output) as folder:
        setup_logging(None)
        saved = world.broadcast(open_run(folder, resume=resume) if world.is_main else None)
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
            check_config(checkpoint, config, folder)
        elif (initial := config.model.initial_checkpoint) and not Path(initial).is_file():
            raise ValueError(f"model.initial_checkpoint = {initial!r}: no such file")
        sets = load_sets(config, data_dir, world, reading)
        if world.is_main:
            folder.checkpoints.mkdir(parents=True, exist_ok=True)
            folder.claim()
            if not folder.recipe.exists():  # it tells the folder of a run
                write_atomically(folder.recipe, dump_toml(config).encode())
            setup_logging(folder.log)
        with Run(config, sets, folder, saved, world) as run:
            steps, warmup_steps = config.training.epochs * run.loop.steps_per_epoch, config.optimizer.warmup_steps
            if warmup_steps >= steps:
                logger.warning(
                    "optimizer.warmup_steps = %d: expected fewer than the run's %d steps", warmup_steps, steps
                )
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
            check_classes(saved.checkpoint, sets.train, folder)
            announce_changes(saved, config, sets, folder)
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
        self.saved_step = saved.checkpoint.step if saved else -1
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
                    self._end_epoch(self.loop.epoch - 1, stop)  # the run was cut off before its score
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
        self._end_epoch(epoch, stop)

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
        if slow := self.world.find_slow(window.seconds):
            logger.warning("steps to %d: %s", loop.step, slow)
        self.records.add_window(
            window, step=loop.step, steps_per_epoch=loop.steps_per_epoch, images_per_step=loop.global_batch_size
        )

    def _is_finished(self) -> bool:
        return _is_finished(self.config, self.loop.steps_per_epoch, self.loop.step, self.validation.scores)

    def _is_over(self) -> bool:
        return self.stopped_by != 0 or self._is_finished()

    def _end_epoch(self, epoch: int, stop: StopRequest) -> None:
        """Save after an epoch, and evaluate where that is due; wait for the score of the last epoch.

        The checkpoint comes first: a run that is stopped or killed within its evaluation repeats that alone.
        """
        is_due = self.validation.is_due(epoch)
        if is_due or epoch % self.config.training.checkpoint_every_epochs == 0:
            self._save()
        agree = partial(self._agree, stop)
        if is_due:
            self._take_score()
            self.records.mlperf.eval_start(epoch)
            with self.train_step.averaged_statistics():
                is_scored = self.validation.start(epoch, agree)
            if is_scored and epoch == self.config.training.epochs and self.validation.wait(agree):
                self._take_score()
        if self.stopped_by and not self._is_finished():
            logger.info("stopped by signal %d in the evaluation, which --resume repeats", self.stopped_by)

    def _agree(self, stop: StopRequest) -> Flags:
        agreed = Flags(*self.world.agree(*self._flags(stop)))
        self.stopped_by = self.stopped_by or agreed.stop_signal
        return agreed

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
        if step == self.saved_step:
            return
        self.folder.check_claim()
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
                with self.world.doing(f"writes {self.folder.checkpoint(step)}"):
                    _write_checkpoint(self, step, ranks)
        self.saved_step = step


def _write_checkpoint(run: Run, step: int, ranks: list[_RankState]) -> None:
    """Write the file of a step from the states of all ranks, which must have the same weights."""
    digests = [rank.weights_digest for rank in ranks]
    if len(set(digests)) > 1:
        raise CheckpointError(f"step {step}: weights differ between ranks: {digests}")
    if run.world.size > 1:
        logger.info("step %d: weights of all %d ranks: %s", step, run.world.size, digests[0])
    checkpoint = Checkpoint(
        config=run.config,
        categories=run.sets.train.categories,
        **run.train_step.state_dict(),
        statistics=[rank.statistics for rank in ranks],
        loader=[rank.loader for rank in ranks],
        losses=[rank.losses for rank in ranks],
        **run.loop.state_dict(),
    )
    save_checkpoint(run.folder.checkpoint(step), checkpoint)
    prune_checkpoints(run.folder.checkpoints, run.config.training.keep_checkpoints)


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
    patience = config.evaluation.patience
    if _has_reached_target(config, scores) or (patience and scores.num_since_best >= patience):
        return True
    last_step = config.training.epochs * steps_per_epoch
    return step > last_step or (step == last_step and config.training.epochs in scores.by_epoch)


def _has_reached_target(config: Config, scores: Scores) -> bool:
    return scores.best_map >= config.evaluation.target_map


def _outcome(config: Config, scores: Scores, stopped_by: int, world: World) -> Outcome:
    return Outcome(stopped_by, scores.best_map, _has_reached_target(config, scores), world.is_main)
