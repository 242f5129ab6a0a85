"""The geometry of boxes and anchors."""

import math

import pytest
import torch
from box_samples import FLOAT64, boxes_of, loop_iou, random_boxes, seeded
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.boxes import cxcywh_to_ltrb, decode_deltas, encode_deltas, iou_matrix, ltrb_to_cxcywh


def test_formats_undo_each_other() -> None:
    boxes = random_boxes(20, seeded(0), FLOAT64)
    torch.testing.assert_close(cxcywh_to_ltrb(ltrb_to_cxcywh(boxes)), boxes)
    assert ltrb_to_cxcywh(boxes_of((0.1, 0.2, 0.5, 1.0))).tolist() == [pytest.approx([0.3, 0.6, 0.4, 0.8])]


def test_iou_of_known_boxes() -> None:
    box = boxes_of((0, 0, 2, 2))
    others = boxes_of((0, 0, 2, 2), (1, 1, 3, 3), (0, 0, 2, 1), (2, 0, 4, 2), (0.5, 0.5, 1.5, 1.5))
    assert iou_matrix(box, others)[0].tolist() == pytest.approx([1, 1 / 7, 0.5, 0, 0.25])


def test_iou_of_boxes_apart_in_both_directions_is_zero() -> None:
    assert iou_matrix(boxes_of((0, 0, 1, 1)), boxes_of((2, 3, 4, 5))).item() == 0


def test_iou_of_boxes_without_area_is_zero() -> None:
    empty = boxes_of((1, 1, 1, 1))
    assert iou_matrix(empty, empty).item() == 0
    assert iou_matrix(empty, boxes_of((0, 0, 2, 2))).item() == 0


def test_iou_takes_leading_dimensions() -> None:
    generator = seeded(0)
    a, b = random_boxes(12, generator, FLOAT64).view(3, 4, 4), random_boxes(6, generator, FLOAT64).view(3, 2, 4)
    expected = [[[loop_iou(x, y) for y in ys] for x in xs] for xs, ys in zip(a.tolist(), b.tolist(), strict=True)]
    torch.testing.assert_close(iou_matrix(a, b), torch.tensor(expected, dtype=FLOAT64))


def test_deltas_of_a_known_box() -> None:
    anchor = torch.tensor([0.5, 0.5, 0.2, 0.4], dtype=FLOAT64)
    box = cxcywh_to_ltrb(torch.tensor([0.6, 0.4, 0.4, 0.2], dtype=FLOAT64))
    expected = [0.1 / 0.2 / 0.1, -0.1 / 0.4 / 0.1, math.log(2) / 0.2, math.log(0.5) / 0.2]
    assert encode_deltas(box, anchor).tolist() == pytest.approx(expected)


@settings(deadline=None)
@given(st.integers(0, 10**6))
def test_decoding_undoes_encoding(seed: int) -> None:
    generator = seeded(seed)
    boxes, anchors = random_boxes(8, generator, FLOAT64), ltrb_to_cxcywh(random_boxes(8, generator, FLOAT64))
    torch.testing.assert_close(decode_deltas(encode_deltas(boxes, anchors), anchors), boxes)
