"""The two ways to write a box: COCO's files hold left, top, width and height; this program computes with corners."""

import numpy as np


def xywh_to_ltrb(boxes_xywh: np.ndarray) -> np.ndarray:
    """Return corners [N, 4] (left, top, right, bottom) of boxes [N, 4] (left, top, width, height), of the same type."""
    return np.concatenate([boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]], axis=1)


def ltrb_to_xywh(boxes_ltrb: np.ndarray) -> np.ndarray:
    """Return left, top, width and height [N, 4] of boxes given by their corners [N, 4], of the same type."""
    return np.concatenate([boxes_ltrb[:, :2], boxes_ltrb[:, 2:] - boxes_ltrb[:, :2]], axis=1)
