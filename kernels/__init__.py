"""The detector's own operators: target encoding, multibox loss, and decoding with non-maximum suppression."""

from kernels.ops import cuda_build, decode_nms, encode_boxes, multibox_loss
from kernels.types import Detections, LossParts, Targets

__all__ = ["Detections", "LossParts", "Targets", "cuda_build", "decode_nms", "encode_boxes", "multibox_loss"]
