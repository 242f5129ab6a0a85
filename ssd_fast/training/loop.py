"""Training steps one after another: what `train` runs and what `profile` measures."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from dali_pipelines.batch import TrainBatch
from ssd_fast.config import Config
from ssd_fast.parts import INPUT
from ssd_fast.training.step import LossMeter, LossWindow, Trainer


class Window(NamedTuple):
    """The steps since the losses were read last. learning_rate: of the last of them."""

    losses: LossWindow
    num_steps: int
    seconds: float
    learning_rate: float


class Done(NamedTuple):
    """What is known after a step. window: None in most steps. agreed: the flags of all ranks, see World.agree."""

    window: Window | None
    agreed: tuple[int, ...]


class Loop:
    """Where a run stands in its steps, and what takes it on."""

    def __init__(self, trainer: Trainer, config: Config, *, steps_per_epoch: int) -> None:
        """trainer: its timeline gets the region INPUT too."""
        self.step = 0
        """Steps done since the run began."""
        self.trainer = trainer
        self.global_batch_size = config.training.batch_size * trainer.world.size
        self.steps_per_epoch = steps_per_epoch
        self._optimizer = config.optimizer
        self._log_every_steps = config.training.log_every_steps
        self._meter = LossMeter(trainer.world)

    def learning_rate(self, step: int) -> float:
        """Of a step, counted from 0."""
        return self._optimizer.learning_rate_at(
            step, global_batch_size=self.global_batch_size, steps_per_epoch=self.steps_per_epoch
        )

    def steps(self, batches: Iterable[TrainBatch], flags: Callable[[], tuple[int, ...]]) -> Iterator[Done]:
        """Trains on the rest of an epoch's batches.

        flags: what this rank has to say to the others after a step.
        """
        start, num_steps = time.perf_counter(), 0
        for batch in self.trainer.timeline.waits(batches, INPUT):
            learning_rate = self.learning_rate(self.step)
            loss = self.trainer.train_step(batch, learning_rate)
            self._meter.add(loss, self.step)
            self.step += 1
            num_steps += 1
            window = None
            done = self.step % self.steps_per_epoch
            if done % self._log_every_steps == 0:  # at the epoch's end too
                losses = self._meter.read()
                window = Window(losses, num_steps, time.perf_counter() - start, learning_rate)
                start, num_steps = time.perf_counter(), 0
            yield Done(window, self.trainer.world.agree(*flags()))
