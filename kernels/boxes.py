"""Geometry of boxes and anchors in plain torch, in the precision of its arguments.

Boxes are fractions of the image's width and height, given as corners (ltrb: left, top, right, bottom) or as centre
and size (cxcywh).
"""

import torch
from torch import Tensor

from kernels.constants import CENTRE_VARIANCE, SIZE_VARIANCE


def ltrb_to_cxcywh(boxes_ltrb: Tensor) -> Tensor:
    """Centre and size of boxes [..., 4] given as corners."""
    left, top, right, bottom = boxes_ltrb.unbind(-1)
    return torch.stack((0.5 * (left + right), 0.5 * (top + bottom), right - left, bottom - top), dim=-1)


def cxcywh_to_ltrb(boxes_cxcywh: Tensor) -> Tensor:
    """Corners of boxes [..., 4] given as centre and size."""
    centres, sizes = boxes_cxcywh[..., :2], boxes_cxcywh[..., 2:]
    return torch.cat((centres - 0.5 * sizes, centres + 0.5 * sizes), dim=-1)


def iou_matrix(boxes_a_ltrb: Tensor, boxes_b_ltrb: Tensor) -> Tensor:
    """Intersection over union of every box of one set with every box of another.

    boxes_a_ltrb: [..., N, 4] and boxes_b_ltrb: [..., M, 4], same unit, left <= right and top <= bottom.
    Returns [..., N, M] in [0, 1]; 0 for two boxes without area.
    """
    a, b = boxes_a_ltrb.unsqueeze(-2), boxes_b_ltrb.unsqueeze(-3)  # [..., N, 1, 4], [..., 1, M, 4]
    sides = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    width, height = sides.clamp(min=0).unbind(-1)
    intersection = width * height
    union = _areas(a) + _areas(b) - intersection
    return torch.where(union > 0, intersection / union, 0)


def encode_deltas(boxes_ltrb: Tensor, anchors_cxcywh: Tensor) -> Tensor:
    """Regression targets of boxes relative to their anchors.

    boxes_ltrb: [..., 4], left < right and top < bottom.
    anchors_cxcywh: [..., 4], same unit.
    Returns [..., 4], dimensionless: centre offset / anchor size / 0.1, log(size ratio) / 0.2.
    Source: Liu et al. 2016, eq. 2; 0.1 and 0.2 are the variances of the authors' Caffe release.
    """
    boxes = ltrb_to_cxcywh(boxes_ltrb)
    anchor_centres, anchor_sizes = anchors_cxcywh[..., :2], anchors_cxcywh[..., 2:]
    offsets = (1 / CENTRE_VARIANCE) * (boxes[..., :2] - anchor_centres) / anchor_sizes
    log_ratios = (1 / SIZE_VARIANCE) * (boxes[..., 2:] / anchor_sizes).log()
    return torch.cat((offsets, log_ratios), dim=-1)


def decode_deltas(deltas: Tensor, anchors_cxcywh: Tensor) -> Tensor:
    """Corners of the boxes that deltas [..., 4] describe relative to anchors [..., 4]; inverse of `encode_deltas`."""
    anchor_centres, anchor_sizes = anchors_cxcywh[..., :2], anchors_cxcywh[..., 2:]
    centres = deltas[..., :2] * CENTRE_VARIANCE * anchor_sizes + anchor_centres
    sizes = (deltas[..., 2:] * SIZE_VARIANCE).exp() * anchor_sizes
    return cxcywh_to_ltrb(torch.cat((centres, sizes), dim=-1))


def _areas(boxes_ltrb: Tensor) -> Tensor:
    left, top, right, bottom = boxes_ltrb.unbind(-1)
    return (right - left) * (bottom - top)
