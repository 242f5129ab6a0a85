"""The detector's own operators: input images, target encoding, multibox loss, decoding with non-maximum suppression.

In: pixels, boxes, anchors, predictions. Out: images, Targets, LossParts, Detections.
May be imported by every room of ssd_fast; imports no other room, not even dali_pipelines.
"""

from kernels.ops import cuda_build, decode_nms, encode_boxes, multibox_loss, resize_normalise
from kernels.types import Detections, LossParts, Targets

__all__ = [
    "Detections",
    "LossParts",
    "Targets",
    "cuda_build",
    "decode_nms",
    "encode_boxes",
    "multibox_loss",
    "resize_normalise",
]
