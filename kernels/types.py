"""Results of the operators."""

from typing import NamedTuple

from torch import Tensor


class Targets(NamedTuple):
    """Training targets of every anchor.

    deltas: [B, A, 4] in the precision of the boxes, see `encode_deltas`; rows of background anchors are zero.
    labels: [B, A] int32, 0 = background.
    """

    deltas: Tensor
    labels: Tensor


class LossParts(NamedTuple):
    """Multibox loss of every image, divided by the image's number of positive anchors.

    box: [B] SmoothL1 part.
    class_: [B] cross-entropy part.
    """

    box: Tensor
    class_: Tensor


class Detections(NamedTuple):
    """Detections of every image, best score first; rows from counts[b] on are zero.

    boxes_ltrb: [B, D, 4] fractions of the image, not clipped to it.
    scores: [B, D] probabilities.
    labels: [B, D] int32, 1 to C - 1.
    counts: [B] int32, 0 to D.
    """

    boxes_ltrb: Tensor
    scores: Tensor
    labels: Tensor
    counts: Tensor
