"""A training run: from a recipe and a data folder to checkpoints, records and images."""

import logging
import math
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch

from ssd_fast.checkpoints.checkpoint import (
    BEST,
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    newest_checkpoint,
    numbered_path,
    prune_checkpoints,
    save_checkpoint,
)
from ssd_fast.checkpoints.weights import load_backbone_weights, load_for_finetuning
from ssd_fast.config import Config
from ssd_fast.data.coco import CocoSet
from ssd_fast.data.loaders import load_sets, make_eval_loader, make_train_loader
from ssd_fast.distributed.world import World
from ssd_fast.evaluation.coco_eval import twelve_numbers
from ssd_fast.evaluation.detector import Detector
from ssd_fast.evaluation.scoring import Scoring, ScoringRequest
from ssd_fast.files import write_atomically
from ssd_fast.hardware import compute_dtype
from ssd_fast.model.anchors import model_anchors
from ssd_fast.model.ssd import SSD
from ssd_fast.progress import Progress, setup_logging, track
from ssd_fast.recipe import dump_toml
from ssd_fast.training.history import MetricsWriter
from ssd_fast.training.loop import Loop, Window
from ssd_fast.training.mlperf_log import MlperfLog
from ssd_fast.training.signals import StopRequest
from ssd_fast.training.step import Trainer
from ssd_fast.training.summary import draw_report

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
DETECTIONS = "detections.json"
INTERRUPTED = "interrupted"  # in the run's folder: it was stopped by a signal, and --resume goes on
MLPERF_TARGET = 0.23  # the mAP that the closed division of MLPerf Training asks of this detector


class Outcome(NamedTuple):
    """How a run ended.

    stopped_by: number of the signal that stopped it, 0 for none. best_map: -1 before the first evaluation.
    """

    stopped_by: int
    best_map: float
    reached_target: bool


def train(config: Config, data_dir: Path, output: Path, *, resume: bool, world: World | None = None) -> Outcome:
    """Trains as a configuration says and leaves everything about the run in a folder.

    data_dir: in COCO's layout.
    output: made if missing. With `resume`, the run in it goes on from its newest readable checkpoint, exactly as if it
    had not been interrupted; where there is none, it begins.
    world: the processes that train together, each with its own call of this. Rank 0 alone reads and writes the folder.
    Raises ValueError (configuration, data, checkpoint), FloatingPointError (loss) and OSError.
    """
    world = world or World()
    with StopRequest() as stop:
        setup_logging(None)
        saved = world.broadcast(_open(output, resume=resume) if world.is_main else None)
        if saved and _is_finished(config, saved.steps_per_epoch, saved.step, saved.scores):
            logger.info("%s: this run is finished, at step %d", output, saved.step)
            return _outcome(config, saved.scores, stopped_by=0)
        if saved and len(saved.loader) != world.size:
            raise CheckpointError(
                f"{output}: a run of {len(saved.loader)} processes: expected as many to go on with it, not {world.size}"
            )
        train_set, val_set = load_sets(config, data_dir)
        if world.is_main:
            (output / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
            setup_logging(output / "train.log")
        with Run(config, train_set, val_set, output, saved, world) as run:
            return run.train(stop)


class Run:
    """One run in progress."""

    def __init__(
        self,
        config: Config,
        train_set: CocoSet,
        val_set: CocoSet,
        output: Path,
        saved: Checkpoint | None,
        world: World,
    ) -> None:
        self.config = config
        self.train_set = train_set
        self.val_set = val_set
        self.output = output
        self.world = world
        self.device = world.device()
        self.mlperf = MlperfLog(output if world.is_main else None)
        self.mlperf.init_start(
            organization="ssd_fast",
            platform=_platform(self.device),
            division="closed" if config.evaluation.target_map == MLPERF_TARGET else "open",
        )
        logger.info("training on %s", train_set.describe())
        logger.info("validating on %s", val_set.describe())
        categories = train_set.categories
        if saved and saved.categories != categories:
            raise CheckpointError(f"{output}: its run has other classes: {[item.name for item in saved.categories]}")

        torch.manual_seed(config.training.seed)
        model = SSD(config.model, num_classes=len(categories))
        if saved is None:
            if world.is_main:
                _load_initial_weights(model, config)
            model.load_state_dict(world.broadcast(model.state_dict()))
        dtype = compute_dtype(config.training.precision, self.device)
        self.trainer = Trainer(
            *(model, config.optimizer), device=self.device, dtype=dtype, world=world, distributed=config.distributed
        )
        anchors_cxcywh = model_anchors(config.model)
        state = bytes(saved.loader[world.rank].numpy()) if saved else None
        self.train_loader = make_train_loader(config, train_set, anchors_cxcywh, self.device, world, state)
        self.eval_loader = make_eval_loader(config, val_set.images, self.device, world=world)
        self.detector = Detector(
            model, anchors_cxcywh.to(self.device), detection=config.detection, categories=categories, dtype=dtype
        )
        self.steps_per_epoch = self.train_loader.steps_per_epoch
        epochs = config.training.epochs
        self.evaluation_epochs = {epochs, *(epoch for epoch in config.evaluation.epochs if epoch < epochs)}

        self.loop = Loop(self.trainer, config, steps_per_epoch=self.train_loader.steps_per_epoch)
        self.scores: dict[int, dict[str, float]] = {}
        self.unscored_epoch = 0  # which has been evaluated, and whose score is still to come
        self.scoring: Scoring | None = None  # of that epoch, on rank 0
        self.evaluation_start = 0.0
        self.stopped_by = 0
        if saved:
            self._restore(saved)
        self.progress = Progress(epochs=config.training.epochs)
        self.metrics: MetricsWriter | None = None
        if world.is_main:
            write_atomically(output / "config.toml", dump_toml(config).encode())
            self.metrics = MetricsWriter(output, resume_step=self.step if saved else None)

    @property
    def step(self) -> int:
        """Steps done since the run began."""
        return self.loop.step

    def train(self, stop: StopRequest) -> Outcome:
        """Runs epochs until the last, the target, or a request to stop."""
        optimizer = self.config.optimizer
        self.mlperf.init_stop(
            seed=self.config.training.seed,
            train_samples=int(np.count_nonzero(np.diff(self.train_set.images.offsets))),
            eval_samples=len(self.val_set.images.file_names),
            global_batch_size=self.loop.global_batch_size,
            learning_rate=optimizer.effective_learning_rate(self.loop.global_batch_size),
            weight_decay=optimizer.weight_decay,
            warmup_steps=optimizer.warmup_steps,
            decay_epochs=optimizer.decay_epochs,
            bn_span=self.config.training.batch_size * self.config.distributed.batch_norm_group,
            crop_attempts=self.config.augmentation.crop_attempts,
        )
        self.mlperf.run_start(
            evaluation_epochs=self.evaluation_epochs,
            resumed_epoch=self.step // self.steps_per_epoch + 1 if self.step else None,
        )
        with self.progress if self.world.is_main else nullcontext():
            while not self._is_over():
                epoch = self.step // self.steps_per_epoch + 1
                if self._is_due(epoch - 1):  # the run was cut off between the epoch's last step and its score
                    self._end_epoch(epoch - 1)
                else:
                    self._train_epoch(epoch, stop)
                    if not self._is_over():
                        self._end_epoch(epoch)
        outcome = _outcome(self.config, self.scores, 0 if self._is_finished() else self.stopped_by)
        self.mlperf.run_stop(success=outcome.reached_target)
        if self.world.is_main and outcome.stopped_by:
            write_atomically(self.output / INTERRUPTED, f"signal {outcome.stopped_by}, step {self.step}\n".encode())
        elif self.world.is_main:
            draw_report(self.output, self.val_set, self.train_set.categories, self.output / DETECTIONS)
        return outcome

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.train_loader.close()
        self.eval_loader.close()
        if self.metrics:
            self.metrics.close()
        self.mlperf.close()

    def _train_epoch(self, epoch: int, stop: StopRequest) -> None:
        """Trains the rest of an epoch, or until the run is over: a request to stop is answered with a checkpoint."""
        training = self.config.training
        self.mlperf.epoch_start(epoch)
        self.progress.start_epoch(epoch, self.steps_per_epoch, start_step=self.step % self.steps_per_epoch)
        for done in self.loop.steps(self.train_loader.epoch(), partial(self._flags, stop)):
            if done.window:
                self._report_window(done.window)
            self.stopped_by, scored_epoch = done.agreed
            if scored_epoch:
                self._take_score(scored_epoch)
            if self.stopped_by or (
                training.checkpoint_every_steps and self.step % training.checkpoint_every_steps == 0
            ):
                self._save()
            if self.stopped_by:
                self.progress.message(
                    f"stopped by signal {self.stopped_by} after step {self.step}; --resume goes on from here"
                )
            if self._is_over():
                return
        self.mlperf.epoch_stop(epoch)

    def _flags(self, stop: StopRequest) -> tuple[int, int]:
        """For the other ranks: the signal that asks to stop, and the epoch that has a score."""
        scored = self.scoring is not None and self.scoring.is_done()
        return stop.received, self.unscored_epoch if scored else 0

    def _report_window(self, window: Window) -> None:
        """Shows the losses since the last reading; raises FloatingPointError when too many are not finite."""
        losses = window.losses
        if losses.num_nonfinite:
            what = (
                f"the loss was not finite in {losses.num_nonfinite} of the last {window.num_steps} steps, last at step "
                f"{losses.last_nonfinite_step} (learning rate "
                f"{self.loop.learning_rate(losses.last_nonfinite_step):.4g})"
            )
            if losses.longest_nonfinite > self.config.training.max_nonfinite_steps:
                raise FloatingPointError(
                    f"{what}: {losses.longest_nonfinite} in a row, more than training.max_nonfinite_steps = "
                    f"{self.config.training.max_nonfinite_steps}; a lower learning rate or a longer warm-up may help"
                )
            self.progress.warning(f"{what}; those steps were skipped")
        means = {"loss": losses.total, "box_loss": losses.box, "class_loss": losses.class_}
        rate = window.num_steps * self.loop.global_batch_size / window.seconds
        figures = {"learning_rate": window.learning_rate, "images_per_second": rate}
        done = (self.step - 1) % self.steps_per_epoch + 1
        self.progress.update(done, **means, **figures)
        if self.metrics:
            self.metrics.train(self.step, self.step / self.steps_per_epoch, **means, **figures)

    def _is_finished(self) -> bool:
        return _is_finished(self.config, self.steps_per_epoch, self.step, self.scores)

    def _is_over(self) -> bool:
        return self.stopped_by != 0 or self._is_finished()

    def _is_due(self, epoch: int) -> bool:
        """Whether an epoch whose steps are done still waits for its evaluation."""
        return (
            epoch in self.evaluation_epochs
            and epoch not in (*self.scores, self.unscored_epoch)
            and self.step == epoch * self.steps_per_epoch
        )

    def _end_epoch(self, epoch: int) -> None:
        """Evaluates after an epoch where that is due, and saves; of the last epoch the score is waited for."""
        if self._is_due(epoch):
            self._evaluate(epoch)
        last = epoch == self.config.training.epochs
        if epoch % self.config.training.checkpoint_every_epochs == 0 or epoch in self.evaluation_epochs or last:
            self._save()
        if last:
            self._take_score(epoch)

    def _evaluate(self, epoch: int) -> None:
        """Detects on all validation images; while another process scores that, training goes on."""
        self._take_score(self.unscored_epoch)
        self.evaluation_start = time.perf_counter()
        self.mlperf.eval_start(epoch)
        with self.trainer.averaged_statistics():
            table = self.detector.detect_set(
                track(self.eval_loader, "evaluating", len(self.eval_loader)), self.val_set, self.world
            )
        self.unscored_epoch = epoch
        if self.world.is_main:
            self.scoring = Scoring(
                ScoringRequest(
                    annotation_file=self.val_set.annotation_file,
                    table=table,
                    category_ids=self.detector.category_ids_in(self.val_set).tolist(),
                    results_file=self.output / DETECTIONS,
                    best_map=self._best_map(),
                )
            )

    def _take_score(self, epoch: int) -> None:
        """Takes in the score of an evaluation, waiting for it, unless that has been done."""
        if epoch == 0 or epoch != self.unscored_epoch:
            return
        timeout_s = self.config.distributed.timeout_s
        numbers = self.world.broadcast(twelve_numbers(self.scoring.result(timeout_s)) if self.scoring else {})
        best_so_far = self._best_map()
        self.scores[epoch] = numbers
        self.unscored_epoch, self.scoring = 0, None
        if self.metrics is None:
            return
        step = epoch * self.steps_per_epoch
        self.mlperf.eval_stop(epoch, numbers["map"])
        self.metrics.evaluation(step, epoch, numbers)
        seconds = time.perf_counter() - self.evaluation_start
        self.progress.evaluation(epoch, numbers["map"], numbers["map_50"], seconds)
        # The weights have moved on; those that were evaluated are in their step's checkpoint.
        path = numbered_path(self.output / CHECKPOINTS, step)
        scored = load_checkpoint(path)._replace(scores=self.scores)
        save_checkpoint(path, scored)
        if numbers["map"] > best_so_far:
            save_checkpoint(path.with_name(BEST), scored)

    def _best_map(self) -> float:
        return max((numbers["map"] for numbers in self.scores.values()), default=-math.inf)

    def _save(self) -> None:
        """Saves this step. A score of an earlier one is waited for: nobody who resumes from here would compute it."""
        if self.unscored_epoch * self.steps_per_epoch != self.step:
            self._take_score(self.unscored_epoch)
        trainer = self.trainer
        own_statistics = trainer.running_statistics.cpu().clone()
        loader = torch.frombuffer(bytearray(self.train_loader.state()), dtype=torch.uint8)
        parts = self.world.gather((own_statistics, loader, trainer.weights_digest()))
        with trainer.averaged_statistics():
            if not parts:
                return
            statistics, loaders, digests = zip(*parts, strict=True)
            if len(set(digests)) > 1:
                raise CheckpointError(f"step {self.step}: weights differ between ranks: {digests}")
            if self.world.size > 1:
                logger.info("step %d: weights of all %d ranks: %s", self.step, self.world.size, digests[0])
            rng = {"cpu": torch.get_rng_state()}
            if self.device.type == "cuda":
                rng["cuda"] = torch.cuda.get_rng_state(self.device)
            checkpoint = Checkpoint(
                config=self.config,
                categories=self.train_set.categories,
                model=trainer.model.state_dict(),
                optimizer=trainer.optimizer.state_dict(),
                scaler=trainer.scaler.state_dict(),
                rng=rng,
                statistics=list(statistics),
                loader=list(loaders),
                step=self.step,
                steps_per_epoch=self.steps_per_epoch,
                scores=self.scores,
            )
            path = numbered_path(self.output / CHECKPOINTS, self.step)
            save_checkpoint(path, checkpoint)
            prune_checkpoints(path.parent, self.config.training.keep_checkpoints)

    def _restore(self, saved: Checkpoint) -> None:
        for key, old, new in _differences(saved.config, self.config):
            if key.startswith("model.") and key not in ("model.backbone_weights", "model.initial_checkpoint"):
                raise CheckpointError(f"{self.output}: its run has {key} = {old!r}: expected the same, not {new!r}")
            logger.warning("the run in %s began with %s = %r; it goes on with %r", self.output, key, old, new)
        self.trainer.model.load_state_dict(saved.model)
        self.trainer.running_statistics.copy_(saved.statistics[self.world.rank])
        self.trainer.optimizer.load_state_dict(saved.optimizer)
        self.trainer.scaler.load_state_dict(saved.scaler)
        torch.set_rng_state(saved.rng["cpu"])
        if "cuda" in saved.rng and self.device.type == "cuda":
            torch.cuda.set_rng_state(saved.rng["cuda"], self.device)
        self.loop.step = saved.step
        self.scores = dict(saved.scores)
        logger.info("%s: goes on after step %d", self.output, self.step)


def _open(output: Path, *, resume: bool) -> Checkpoint | None:
    """What a run in a folder is to go on from. Raises CheckpointError when it would overwrite another."""
    if not resume and (output / METRICS).exists():
        raise CheckpointError(f"{output}: holds a run already: expected another --output, or --resume to go on with it")
    (output / INTERRUPTED).unlink(missing_ok=True)
    return newest_checkpoint(output / CHECKPOINTS) if resume else None


def _load_initial_weights(model: SSD, config: Config) -> None:
    if config.model.initial_checkpoint is None:
        load_backbone_weights(model, config.model.backbone_weights)
        return
    fresh = load_for_finetuning(model, Path(config.model.initial_checkpoint))
    if fresh:
        logger.warning(
            "%s does not fit these classes: heads initialised anew: %s", config.model.initial_checkpoint, fresh
        )


def _is_finished(config: Config, steps_per_epoch: int, step: int, scores: dict[int, dict[str, float]]) -> bool:
    if _outcome(config, scores, 0).reached_target:
        return True
    last_step = config.training.epochs * steps_per_epoch
    return step > last_step or (step == last_step and config.training.epochs in scores)


def _outcome(config: Config, scores: dict[int, dict[str, float]], stopped_by: int) -> Outcome:
    best = max((epoch_scores["map"] for epoch_scores in scores.values()), default=-1.0)
    return Outcome(stopped_by=stopped_by, best_map=best, reached_target=best >= config.evaluation.target_map)


def _differences(old: Config, new: Config) -> list[tuple[str, object, object]]:
    """Keys (section.key) in which two configurations differ, with both values."""
    before, after = old.model_dump(), new.model_dump()
    return [
        (f"{section}.{key}", value, after[section][key])
        for section, keys in before.items()
        for key, value in keys.items()
        if value != after[section][key]
    ]


def _platform(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
