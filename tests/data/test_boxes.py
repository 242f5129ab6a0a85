"""The two ways to write a box."""

import numpy as np

from ssd_fast.data.boxes import ltrb_to_xywh, xywh_to_ltrb


def test_corners_are_the_first_corner_plus_the_sides_and_back() -> None:
    boxes_xywh = np.array([[1.5, 2, 10, 20.25], [0, 0, 0, 0], [-3, 4, 5, 6]])
    boxes_ltrb = xywh_to_ltrb(boxes_xywh)
    assert boxes_ltrb.tolist() == [[1.5, 2, 11.5, 22.25], [0, 0, 0, 0], [-3, 4, 2, 10]]
    assert np.array_equal(ltrb_to_xywh(boxes_ltrb), boxes_xywh)


def test_no_boxes_give_no_boxes_of_the_same_type() -> None:
    for convert in (xywh_to_ltrb, ltrb_to_xywh):
        converted = convert(np.zeros((0, 4), np.float32))
        assert (converted.shape, converted.dtype) == ((0, 4), np.float32)
