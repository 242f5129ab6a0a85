"""Training steps one after another: the loop that training runs and that the profile measures."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from dali_pipelines.batch import TrainBatch
from ssd_fast.config.sections import Config
from ssd_fast.parts import INPUT
from ssd_fast.training.step import LossMeter, LossWindow, TrainStep


class Window(NamedTuple):
    """The steps between two readings of the losses. learning_rate: of the last of them."""

    losses: LossWindow
    num_steps: int
    seconds: float
    learning_rate: float


class Flags(NamedTuple):
    """Messages of a rank to the others after a step; 0 means nothing.

    stop_signal: number of the signal that asks the run to stop. scored_epoch: the epoch whose score is there.
    """

    stop_signal: int = 0
    scored_epoch: int = 0


class Done(NamedTuple):
    """The result of a step. window: None in most steps. agreed: the flags of all ranks, one step late (World.agree)."""

    window: Window | None
    agreed: Flags


class Loop:
    """The position of a run in its steps.

    step: steps done since the run began.
    """

    def __init__(self, train_step: TrainStep, config: Config, *, steps_per_epoch: int) -> None:
        """train_step: its timeline gets the region INPUT too."""
        self.step = 0
        self.train_step = train_step
        self.global_batch_size = config.training.batch_size * train_step.world.size
        self.steps_per_epoch = steps_per_epoch
        self._optimizer = config.optimizer
        self._epochs = config.training.epochs
        self._log_every_steps = config.training.log_every_steps
        self._meter = LossMeter(train_step.world)

    @property
    def epoch(self) -> int:
        """The epoch (from 1) that the next step belongs to."""
        return self.step // self.steps_per_epoch + 1

    @property
    def is_at_epoch_end(self) -> bool:
        """True between two epochs."""
        return self.step % self.steps_per_epoch == 0

    def learning_rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        return self._optimizer.learning_rate_at(
            step,
            global_batch_size=self.global_batch_size,
            steps_per_epoch=self.steps_per_epoch,
            epochs=self._epochs,
        )

    def steps(self, batches: Iterable[TrainBatch], flags: Callable[[], Flags]) -> Iterator[Done]:
        """Train on the rest of an epoch's batches, one for each item. flags: asked for this rank's after each step."""
        start, num_steps = time.perf_counter(), 0
        for batch in self.train_step.timeline.waits(batches, INPUT):
            learning_rate = self.learning_rate(self.step)
            loss = self.train_step(batch, learning_rate)
            self._meter.add(loss, self.step)
            self.step += 1
            num_steps += 1
            window = None
            if self.step % self.steps_per_epoch % self._log_every_steps == 0:  # at the end of an epoch too
                losses = self._meter.read()
                window = Window(losses, num_steps, time.perf_counter() - start, learning_rate)
                start, num_steps = time.perf_counter(), 0
            yield Done(window, Flags(*self.train_step.world.agree(*flags())))

    def state_dict(self) -> dict[str, Any]:
        """The position, for `load_state_dict`."""
        return {
            "step": self.step,
            "steps_per_epoch": self.steps_per_epoch,
            "nonfinite_in_a_row": self._meter.nonfinite_in_a_row,
        }

    def unread_losses(self) -> torch.Tensor:
        """This rank's losses since they were last read, [W, 3]."""
        return self._meter.unread()

    def load_state_dict(self, state: Mapping[str, Any], rank: int) -> None:
        """Continue at a position. rank: whose losses to go on with, of those of all ranks in the state."""
        self.step = state["step"]
        self._meter.nonfinite_in_a_row = state["nonfinite_in_a_row"]
        if state["losses"]:  # none in a checkpoint of an earlier version
            self._meter.continue_window(state["losses"][rank].to(self.train_step.device), self.step)
