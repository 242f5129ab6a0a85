"""The training loss of a batch."""

from typing import NamedTuple

from torch import Tensor

from kernels import multibox_loss
from ssd_fast.model.ssd import Predictions


class Loss(NamedTuple):
    """Means over the images of a batch, float32 scalars (float64 for float64 predictions); total = box + class_."""

    total: Tensor
    box: Tensor
    class_: Tensor


def multibox_loss_mean(predictions: Predictions, target_deltas: Tensor, target_labels: Tensor) -> Loss:
    """Multibox loss of a batch. An image without positive anchors counts in the mean, with loss 0.

    target_deltas: [B, A, 4] and target_labels: [B, A], as `kernels.encode_boxes` returns them.
    """
    parts = multibox_loss(predictions.deltas, predictions.logits, target_deltas, target_labels)
    box, class_ = parts.box.mean(), parts.class_.mean()
    return Loss(total=box + class_, box=box, class_=class_)
