"""The detector's own operators: target encoding, multibox loss, and decoding with non-maximum suppression.

In: boxes, anchors, predictions. Out: Targets, LossParts, Detections.
May be imported by every room of ssd_fast; imports no other room, not even dali_pipelines.
"""

from kernels.ops import cuda_build, decode_nms, encode_boxes, multibox_loss
from kernels.types import Detections, LossParts, Targets

__all__ = ["Detections", "LossParts", "Targets", "cuda_build", "decode_nms", "encode_boxes", "multibox_loss"]
