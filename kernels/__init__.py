"""The detector's own operators: target encoding, multibox loss, and decoding with non-maximum suppression."""

from kernels.reference import Detections, LossParts, Targets, decode_nms, encode_boxes, multibox_loss

__all__ = ["Detections", "LossParts", "Targets", "decode_nms", "encode_boxes", "multibox_loss"]
