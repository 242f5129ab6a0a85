"""One training step and the meter of its losses."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch

from dali_pipelines.batch import TrainBatch
from ssd_fast.config.sections import DistributedConfig, OptimizerConfig
from ssd_fast.distributed.world import World
from ssd_fast.model.loss import Loss, multibox_loss_mean
from ssd_fast.model.ssd import SSD, on_device
from ssd_fast.parts import ALLREDUCE, BACKWARD, FORWARD, LOSS, OPTIMIZER
from ssd_fast.timing import NULL_TIMELINE, NullTimeline
from ssd_fast.training.optim import group_batch_norm, make_optimizer, make_scaler, set_learning_rate


class TrainStep:
    """One training step of a network, with its optimizer and gradient scaler.

    running_statistics: [N] float32, means and variances of all BatchNorm layers; the model has views of it.
    timeline: gets the regions of STEP_PARTS in every step.
    """

    def __init__(
        self,
        model: SSD,
        config: OptimizerConfig,
        *,
        device: torch.device,
        dtype: torch.dtype,
        world: World | None = None,
        distributed: DistributedConfig | None = None,
    ) -> None:
        """Move the model to the device.

        dtype: in which the network computes, under autocast unless it is float32; parameters stay float32.
        world: the ranks that train together. The model must be the same on all of them; it stays the same but for
            running_statistics.
        """
        self.timeline: NullTimeline = NULL_TIMELINE
        self.world = world or World()
        distributed = distributed or DistributedConfig()
        self.model = on_device(model, device).train()
        if distributed.batch_norm_group > 1:
            group_batch_norm(self.model, distributed.batch_norm_group, device=device, dtype=dtype, world=self.world)
        self.device = device
        self.dtype = dtype
        self.clip_norm = config.clip_norm
        self.running_statistics = _share_storage(self.model)
        self.optimizer = self.world.wrap(
            make_optimizer(self.model, config, device), self.model.named_parameters(), distributed
        )
        self.scaler = make_scaler(device, dtype)

    def __call__(self, batch: TrainBatch, learning_rate: float) -> Loss:
        """Run forward, loss, backward and update for one batch; return the loss before the update, on the device.

        Does not wait for the device. A loss or gradient that is not finite, on any rank, leaves parameters and momentum
        unchanged. A loss that is not finite on this rank leaves its BatchNorm statistics unchanged too.
        """
        timeline, autocast = self.timeline, self.dtype != torch.float32
        with timeline.region(FORWARD):
            statistics = self.running_statistics.clone()
            with torch.autocast(self.device.type, dtype=self.dtype, enabled=autocast):
                predictions = self.model(batch.images if autocast else batch.images.float())
        with timeline.region(LOSS):
            loss = multibox_loss_mean(predictions, batch.deltas, batch.labels)
            finite = torch.isfinite(loss.total)
        with timeline.region(BACKWARD):
            self.optimizer.zero_grad()
            # An infinite loss may have finite gradients: NaN in their place makes the scaler skip the step all the
            # same, and by way of the averaged gradients the scaler of every rank.
            self.scaler.scale(loss.total).backward(torch.where(finite, 1.0, float("nan")))
        with ExitStack() as averaged:
            with timeline.region(ALLREDUCE):
                averaged.enter_context(self.world.averaged_gradients(self.optimizer))
            with timeline.region(OPTIMIZER):
                set_learning_rate(self.optimizer, learning_rate)
                self.scaler.unscale_(self.optimizer)
                if self.clip_norm is not None:
                    torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
                self.scaler.step(self.optimizer)
                self.scaler.update(None if self.dtype == torch.float16 else 1.0)
                self.running_statistics.copy_(torch.where(finite, self.running_statistics, statistics))
        return Loss(*(part.detach() for part in loss))

    @contextmanager
    def averaged_statistics(self) -> Iterator[None]:
        """A context in which BatchNorm's running statistics are the means over all ranks, for evaluating and saving.

        Each rank's own come back after it. Training does not read them, and so continues exactly.
        """
        own = self.running_statistics.clone()
        self.world.average_(self.running_statistics)
        try:
            yield
        finally:
            self.running_statistics.copy_(own)

    def weights_digest(self) -> str:
        """SHA-256 of the parameters."""
        digest = hashlib.sha256()
        for parameter in self.model.parameters():
            digest.update(parameter.detach().cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def state_dict(self) -> dict[str, Any]:
        """State of model, optimizer and scaler, and of torch's random generators, for `load_state_dict`."""
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": rng,
        }

    def load_state_dict(self, state: Mapping[str, Any], running_statistics: torch.Tensor) -> None:
        """Continue from a state. running_statistics: this rank's own, in place of the model's."""
        self.model.load_state_dict(state["model"])
        self.running_statistics.copy_(running_statistics)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"]["cpu"])
        if "cuda" in state["rng"] and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)


class LossWindow(NamedTuple):
    """Losses of a window of steps: means over all ranks and over the steps with a finite loss, NaN without such a step.

    num_nonfinite: steps with a loss that is not finite. longest_nonfinite: the most of them in a row, including those
    before the window. last_nonfinite_step: -1 if there was none.
    """

    total: float
    box: float
    class_: float
    num_nonfinite: int
    longest_nonfinite: int
    last_nonfinite_step: int


class LossMeter:
    """A store of losses on the device, which the host reads once per window; all ranks read the same."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._losses: list[torch.Tensor] = []
        self._steps: list[int] = []
        self.nonfinite_in_a_row = 0  # at the end of the last window

    def add(self, loss: Loss, step: int) -> None:
        """Add the loss of a step, without waiting for it."""
        self._losses.append(torch.stack([loss.total, loss.box, loss.class_]))
        self._steps.append(step)

    def unread(self) -> torch.Tensor:
        """Return the losses of the window so far, [W, 3] on the CPU, for `continue_window`. Waits for the device."""
        return torch.stack(self._losses).cpu() if self._losses else torch.zeros(0, 3)

    def continue_window(self, losses: torch.Tensor, step: int) -> None:
        """Go on with a window whose last step is the one before step."""
        self._losses = list(losses)
        self._steps = list(range(step - len(losses), step))

    def read(self) -> LossWindow:
        """Return the window so far and begin the next one. Waits for the device and for the other ranks."""
        losses = self._world.average_(torch.stack(self._losses).double().cpu())  # one bad loss spoils the mean: wanted
        finite = torch.isfinite(losses).all(dim=1)
        longest = self.nonfinite_in_a_row
        for good in finite.tolist():
            self.nonfinite_in_a_row = 0 if good else self.nonfinite_in_a_row + 1
            longest = max(longest, self.nonfinite_in_a_row)
        last = max((step for step, good in zip(self._steps, finite.tolist(), strict=True) if not good), default=-1)
        self._losses, self._steps = [], []
        total, box, class_ = losses[finite].mean(dim=0).tolist()
        return LossWindow(total, box, class_, int((~finite).sum()), longest, last)


def _share_storage(model: SSD) -> torch.Tensor:
    """Make all running statistics of the model views of one tensor [N], which one operation saves or restores."""
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    flat = torch.cat([buffer.flatten() for buffer in buffers])
    for buffer, view in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
        buffer.data = view
    return flat
