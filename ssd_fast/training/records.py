"""The records of a run: for people (progress, train.log), for programs (metrics.jsonl, TensorBoard), for MLPerf."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch

from ssd_fast.config.sections import Config
from ssd_fast.distributed.world import World
from ssd_fast.progress import Progress
from ssd_fast.training.folder import RunFolder
from ssd_fast.training.history import MetricsWriter
from ssd_fast.training.loop import Window
from ssd_fast.training.mlperf_log import MlperfLog
from ssd_fast.training.validation import Scored

MLPERF_TARGET = 0.23  # COCO mAP that the closed division of MLPerf Training asks of this detector


class Records:
    """Everything a run says; ranks other than 0 say nothing."""

    def __init__(self, folder: RunFolder, config: Config, world: World, device: torch.device) -> None:
        """Begin the log of MLPerf, whose clock of the initialisation starts here."""
        self._folder = folder
        self._config = config
        self._world = world
        self._metrics: MetricsWriter | None = None
        self.progress = Progress(epochs=config.training.epochs)
        self.mlperf = MlperfLog(folder.mlperf_log if world.is_main else None)
        self.mlperf.init_start(
            organization="ssd_fast",
            platform=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
            division="closed" if config.evaluation.target_map == MLPERF_TARGET else "open",
        )

    def open_history(self, resume_step: int | None, scored_epochs: Collection[int]) -> None:
        """Open metrics.jsonl and TensorBoard, without what an earlier attempt wrote of steps that are done again."""
        if self._world.is_main:
            self._metrics = MetricsWriter(self._folder, resume_step=resume_step, scored_epochs=scored_epochs)

    def begin(
        self, *, train_samples: int, eval_samples: int, evaluation_epochs: Collection[int], resumed_epoch: int | None
    ) -> None:
        """Begin training. train_samples, eval_samples: images. resumed_epoch: of a resumed run, from 1."""
        optimizer, training = self._config.optimizer, self._config.training
        global_batch_size = training.batch_size * self._world.size
        self.mlperf.init_stop(
            seed=training.seed,
            train_samples=train_samples,
            eval_samples=eval_samples,
            global_batch_size=global_batch_size,
            learning_rate=optimizer.effective_learning_rate(global_batch_size),
            weight_decay=optimizer.weight_decay,
            warmup_steps=optimizer.warmup_steps,
            decay_epochs=optimizer.decay_epochs if optimizer.schedule == "steps" else (),
            bn_span=training.batch_size * self._config.distributed.batch_norm_group,
            crop_attempts=self._config.augmentation.crop_attempts,
        )
        self.mlperf.run_start(evaluation_epochs=evaluation_epochs, resumed_epoch=resumed_epoch)

    @contextmanager
    def display(self) -> Iterator[None]:
        """A context in which a terminal shows the live display."""
        if not self._world.is_main:
            yield
            return
        with self.progress:
            yield

    def begin_epoch(self, epoch: int, steps_per_epoch: int, start_step: int) -> None:
        """Begin an epoch (from 1), or continue it after start_step of its steps."""
        self.mlperf.epoch_start(epoch)
        self.progress.start_epoch(epoch, steps_per_epoch, start_step=start_step)

    def add_window(self, window: Window, *, step: int, steps_per_epoch: int, images_per_step: int) -> None:
        """Add the mean losses of a window of steps that ends after `step` steps of the run."""
        losses = window.losses
        figures = {
            "loss": losses.total,
            "box_loss": losses.box,
            "class_loss": losses.class_,
            "learning_rate": window.learning_rate,
            "images_per_second": window.num_steps * images_per_step / window.seconds,
        }
        self.progress.update((step - 1) % steps_per_epoch + 1, **figures)
        if self._metrics:
            self._metrics.train(step, step / steps_per_epoch, **figures)

    def add_score(self, scored: Scored, step: int) -> None:
        """Add the score of the evaluation after `step` steps."""
        if self._metrics:
            self.mlperf.eval_stop(scored.epoch, scored.numbers["map"])
            self._metrics.evaluation(step, scored.epoch, scored.numbers)
            self.progress.evaluation(scored.epoch, scored.numbers["map"], scored.numbers["map_50"], scored.seconds)

    def close(self) -> None:
        """Close all files."""
        if self._metrics:
            self._metrics.close()
        self.mlperf.close()
