"""One training step and the meter of its losses, shared by training and profiling."""

from typing import NamedTuple

import torch

from dali_pipelines.batch import TrainBatch
from ssd_fast.config import OptimizerConfig
from ssd_fast.loss import Loss, multibox_loss_mean
from ssd_fast.model import SSD, on_device
from ssd_fast.optim import make_optimizer, make_scaler, set_learning_rate


class Trainer:
    """A network and its optimizer, and the step that trains them."""

    def __init__(self, model: SSD, config: OptimizerConfig, *, device: torch.device, dtype: torch.dtype) -> None:
        """dtype: what the network computes in, under autocast unless it is float32; parameters stay float32.

        The attribute running_statistics, [N] float32, holds BatchNorm's means and variances; the model has views of it.
        """
        self.model = on_device(model, device).train()
        self.device = device
        self.dtype = dtype
        self.clip_norm = config.clip_norm
        self.running_statistics = _share_storage(self.model)
        self.optimizer = make_optimizer(self.model, config)
        self.scaler = make_scaler(device, dtype)

    def train_step(self, batch: TrainBatch, learning_rate: float) -> Loss:
        """Forward, loss, backward and update for one batch; the loss before the update, on the device.

        Does not wait for the device. A step whose loss or gradient is not finite leaves parameters and momentum as they
        were, and one whose loss is not finite BatchNorm's statistics too.
        """
        statistics = self.running_statistics.clone()
        set_learning_rate(self.optimizer, learning_rate)
        autocast = self.dtype != torch.float32
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=autocast):
            predictions = self.model(batch.images if autocast else batch.images.float())
        loss = multibox_loss_mean(predictions, batch.deltas, batch.labels)
        self.optimizer.zero_grad()
        finite = torch.isfinite(loss.total)
        # an infinite loss may have finite gradients: NaN in their place makes the scaler skip the step all the same
        self.scaler.scale(loss.total).backward(torch.where(finite, 1.0, float("nan")))
        if self.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update(None if self.dtype == torch.float16 else 1.0)
        self.running_statistics.copy_(torch.where(finite, self.running_statistics, statistics))
        return Loss(*(part.detach() for part in loss))


class LossWindow(NamedTuple):
    """Means of the finite losses over a window of steps (NaN where there was none), and what was not finite.

    longest_nonfinite: most steps in a row, those before the window included. last_nonfinite_step: -1 if there was none.
    """

    total: float
    box: float
    class_: float
    num_nonfinite: int
    longest_nonfinite: int
    last_nonfinite_step: int


class LossMeter:
    """Adds up losses on the device, for the host to read once per window."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(3, device=device, dtype=torch.float64)
        self._num_finite, self._num_nonfinite, self._in_a_row, self._longest = torch.zeros(4, device=device).long()
        self._last_step = torch.full((), -1, device=device)

    def add(self, loss: Loss, step: int) -> None:
        """Takes in the loss of a step, without waiting for it."""
        losses = torch.stack([loss.total, loss.box, loss.class_]).double()
        finite = torch.isfinite(losses).all()
        self._sums = self._sums + torch.where(finite, losses, 0.0)
        self._num_finite = self._num_finite + finite
        self._num_nonfinite = self._num_nonfinite + ~finite
        self._in_a_row = torch.where(finite, 0, self._in_a_row + 1)
        self._longest = torch.maximum(self._longest, self._in_a_row)
        self._last_step = torch.where(finite, self._last_step, step)

    def read(self) -> LossWindow:
        """The window so far, and the beginning of the next. Waits for the device."""
        counts = torch.stack([self._num_finite, self._num_nonfinite, self._longest, self._last_step])
        total, box, class_, num_finite, *nonfinite = torch.cat([self._sums, counts.double()]).tolist()
        self._sums, self._longest = torch.zeros_like(self._sums), self._in_a_row
        self._num_finite, self._num_nonfinite = torch.zeros_like(counts[:2]).unbind()
        divisor = num_finite or float("nan")
        return LossWindow(total / divisor, box / divisor, class_ / divisor, *map(int, nonfinite))


def _share_storage(model: SSD) -> torch.Tensor:
    """One tensor [N] that all running statistics of the model become views of: saved or restored in one operation."""
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    flat = torch.cat([buffer.flatten() for buffer in buffers])
    for buffer, view in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
        buffer.data = view
    return flat
