"""The plain decoding and suppression against a loop over Python numbers, and rule by rule."""

import math
from typing import Any

import pytest
import torch
from box_samples import FLOAT64, boxes_of, loop_iou, random_boxes, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.boxes import decode_deltas, ltrb_to_cxcywh
from kernels.reference import decode_nms
from kernels.types import Detections

Row = tuple[list[float], float, int]


def loop_detect(
    deltas: Tensor, logits: Tensor, anchors: Tensor, threshold: float, iou: float, per_class: int, most: int
) -> list[Row]:
    """Boxes, scores and labels of one image, from Python numbers."""
    boxes = decode_deltas(deltas, anchors).tolist()
    scores = logits.softmax(-1).tolist()
    survivors = []
    for label in range(1, len(scores[0])):
        order = sorted((-row[label], anchor) for anchor, row in enumerate(scores) if row[label] > threshold)
        kept: list[int] = []
        for negative_score, anchor in order[:per_class]:
            if all(loop_iou(boxes[other], boxes[anchor]) < iou for other in kept):
                kept.append(anchor)
                survivors.append((negative_score, anchor, label))
    return [(boxes[anchor], -negative_score, label) for negative_score, anchor, label in sorted(survivors)[:most]]


def rows_of(detections: Detections, image: int) -> list[Row]:
    count = int(detections.counts[image])
    columns = (detections.boxes_ltrb, detections.scores, detections.labels)
    return list(zip(*(column[image, :count].tolist() for column in columns), strict=True))


def detect_one(anchors_ltrb: Tensor, probabilities: list[list[float]], **options: Any) -> list[Row]:
    """Detections of one image that predicts the anchors themselves; probabilities of background and classes."""
    anchors = ltrb_to_cxcywh(anchors_ltrb)
    logits = torch.tensor([probabilities], dtype=FLOAT64).log().clamp(min=-1000)
    return rows_of(decode_nms(torch.zeros(1, len(anchors), 4, dtype=FLOAT64), logits, anchors, **options), 0)


FAR_APART = boxes_of((0, 0, 0.25, 0.25), (0.5, 0, 0.75, 0.25), (0, 0.5, 0.25, 0.75), (0.5, 0.5, 0.75, 0.75))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    levels=st.sampled_from([3, 40]),
    per_class=st.sampled_from([1, 4, 200]),
    most=st.sampled_from([1, 7, 200]),
)
def test_detections_equal_a_loop_over_boxes(seed: int, levels: int, per_class: int, most: int) -> None:
    generator = seeded(seed)
    anchors = ltrb_to_cxcywh(random_boxes(24, generator, FLOAT64))
    deltas = torch.randn(2, 24, 4, generator=generator, dtype=FLOAT64)
    logits = torch.randint(0, levels, (2, 24, 4), generator=generator).double() * 4 / levels  # few levels: many ties
    detections = decode_nms(
        deltas,
        logits,
        anchors,
        score_threshold=0.2,
        iou_threshold=0.3,
        max_per_class=per_class,
        max_detections=most,
    )
    for image in range(2):
        expected = loop_detect(deltas[image], logits[image], anchors, 0.2, 0.3, per_class, most)
        found = rows_of(detections, image)
        assert [row[2] for row in found] == [row[2] for row in expected]
        for (box, score, _), (expected_box, expected_score, _) in zip(found, expected, strict=True):
            assert box == pytest.approx(expected_box)
            assert score == pytest.approx(expected_score)


def test_probability_of_exactly_the_threshold_is_dropped() -> None:
    even = [[0.5, 0.5]] * 4
    assert detect_one(FAR_APART, even, score_threshold=0.5) == []
    assert len(detect_one(FAR_APART, even, score_threshold=0.4999)) == 4


def test_overlap_of_exactly_the_threshold_is_dropped() -> None:
    boxes = boxes_of((0, 0, 1, 1), (0, 0, 1, 0.5), (0, 0, 1, 0.4375))
    found = detect_one(boxes, [[0.1, 0.9], [0.2, 0.8], [0.3, 0.7]], iou_threshold=0.5)
    assert [row[0] for row in found] == boxes[[0, 2]].tolist()


def test_a_dropped_box_drops_none() -> None:
    chain = boxes_of((0, 0, 0.5, 1), (0.125, 0, 0.625, 1), (0.25, 0, 0.75, 1))  # neighbours overlap by 0.6
    found = detect_one(chain, [[0.1, 0.9], [0.2, 0.8], [0.3, 0.7]])
    assert [row[0] for row in found] == chain[[0, 2]].tolist()


def test_classes_do_not_suppress_each_other() -> None:
    found = detect_one(boxes_of((0, 0, 1, 1), (0, 0, 1, 1)), [[0.1, 0.8, 0.1], [0.1, 0.2, 0.7]], score_threshold=0.15)
    assert [row[2] for row in found] == [1, 2]


def test_the_best_of_a_class_are_taken_before_suppression() -> None:
    boxes = boxes_of((0, 0, 0.5, 0.5), (0, 0, 0.5, 0.5), (0.5, 0.5, 1, 1))
    scores = [[0.1, 0.9], [0.2, 0.8], [0.3, 0.7]]
    assert len(detect_one(boxes, scores, max_per_class=2)) == 1
    assert len(detect_one(boxes, scores, max_per_class=3)) == 2


def test_the_best_of_the_image_are_kept_in_descending_order() -> None:
    scores = [[0.4, 0.5, 0.1], [0.1, 0.2, 0.7], [0.3, 0.6, 0.1], [0.1, 0.8, 0.1]]
    found = detect_one(FAR_APART, scores, max_detections=3)
    assert [(row[1], row[2]) for row in found] == [
        (pytest.approx(0.8), 1),
        (pytest.approx(0.7), 2),
        (pytest.approx(0.6), 1),
    ]


def test_equal_scores_come_in_the_order_of_anchor_then_class() -> None:
    found = detect_one(FAR_APART, [[0.25, 0.25, 0.25, 0.25]] * 4, max_detections=7)
    boxes = FAR_APART.tolist()
    assert [(boxes.index(row[0]), row[2]) for row in found] == [
        (0, 1),
        (0, 2),
        (0, 3),
        (1, 1),
        (1, 2),
        (1, 3),
        (2, 1),
    ]


def test_of_equal_overlapping_boxes_the_lower_anchor_remains() -> None:
    boxes = boxes_of((0, 0, 1, 1), (0, 0, 1, 0.75))
    assert [row[0] for row in detect_one(boxes, [[0.5, 0.5]] * 2)] == [[0, 0, 1, 1]]


def test_boxes_are_not_clipped_to_the_image() -> None:
    outside = boxes_of((-0.5, 0.25, 0.25, 1.75))
    assert detect_one(outside, [[0.1, 0.9]])[0][0] == outside[0].tolist()


def test_an_image_without_detections_is_empty_and_leaves_the_others_alone() -> None:
    anchors = ltrb_to_cxcywh(FAR_APART)
    logits = torch.zeros(3, 4, 2, dtype=FLOAT64)
    logits[[0, 2], :, 0] = 9
    detections = decode_nms(torch.zeros(3, 4, 4, dtype=FLOAT64), logits, anchors, max_detections=6)
    assert detections.counts.tolist() == [0, 4, 0]
    assert detections.boxes_ltrb.shape == (3, 6, 4)
    assert detections.labels.dtype == detections.counts.dtype == torch.int32
    for values in (detections.boxes_ltrb, detections.scores, detections.labels):
        assert values[[0, 2]].eq(0).all()
        assert values[1, 4:].eq(0).all()
        assert values[1, :4].ne(0).any()


def test_an_empty_batch_has_empty_detections() -> None:
    detections = decode_nms(torch.zeros(0, 4, 4), torch.zeros(0, 4, 3), torch.ones(4, 4))
    assert detections.scores.shape == (0, 200)
    assert detections.counts.shape == (0,)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["logits", "deltas"])
def test_an_anchor_with_a_number_that_is_not_finite_gives_no_detection(place: str, value: float) -> None:
    inputs: dict[str, Any] = {"logits": torch.zeros(1, 4, 3), "deltas": torch.zeros(1, 4, 4)}
    inputs[place][0, 1, 2] = value
    found = rows_of(decode_nms(anchors_cxcywh=ltrb_to_cxcywh(FAR_APART), **inputs), 0)
    assert {FAR_APART.tolist().index(row[0]) for row in found} == {0, 2, 3}


def test_a_box_too_large_for_its_precision_gives_no_detection() -> None:
    deltas = torch.zeros(1, 4, 4)
    deltas[0, 2, 3] = 1000
    found = rows_of(decode_nms(deltas, torch.zeros(1, 4, 2), ltrb_to_cxcywh(FAR_APART)), 0)
    assert {FAR_APART.tolist().index(row[0]) for row in found} == {0, 1, 3}


def test_float32_agrees_with_float64_and_16_bit_is_computed_in_float32() -> None:
    generator = seeded(0)
    anchors = ltrb_to_cxcywh(random_boxes(200, generator, FLOAT64))
    deltas = torch.randn(2, 200, 4, generator=generator).bfloat16()
    logits = torch.randn(2, 200, 5, generator=generator).mul(2).bfloat16()
    half, single, double = (
        decode_nms(deltas.to(t), logits.to(t), anchors) for t in (deltas.dtype, torch.float32, FLOAT64)
    )
    assert half.scores.dtype == half.boxes_ltrb.dtype == torch.float32
    for found, expected in zip(half, single, strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(single.counts, double.counts)
    assert torch.equal(single.labels, double.labels)
    torch.testing.assert_close(single.boxes_ltrb.double(), double.boxes_ltrb, rtol=0, atol=1e-5)
    torch.testing.assert_close(single.scores.double(), double.scores, rtol=0, atol=1e-6)


def test_non_contiguous_input_gives_the_same_and_no_input_is_changed() -> None:
    generator = seeded(0)
    anchors = ltrb_to_cxcywh(random_boxes(50, generator, FLOAT64))
    deltas, logits = torch.randn(2, 50, 4, generator=generator), torch.randn(2, 50, 5, generator=generator)
    copies = deltas.mT.contiguous().mT, logits.mT.contiguous().mT, anchors.T.contiguous().T
    plain = decode_nms(deltas, logits, anchors)
    assert plain.counts.gt(0).all()
    for found, expected in zip(decode_nms(*copies), plain, strict=True):
        assert torch.equal(found, expected)
    for copy, original in zip(copies, (deltas, logits, anchors), strict=True):
        assert torch.equal(copy, original)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("deltas", torch.zeros(2, 4)),
        ("deltas", torch.zeros(2, 5, 4, dtype=torch.int64)),
        ("logits", torch.zeros(2, 4, 3)),
        ("logits", torch.zeros(2, 5, 1)),
        ("anchors_cxcywh", torch.zeros(4, 4)),
        ("anchors_cxcywh", torch.zeros(5, 4, device="meta")),
        ("max_per_class", 0),
        ("max_detections", 0),
    ],
)
def test_bad_input_is_named(name: str, value: Tensor | int) -> None:
    good: dict[str, Any] = {
        "deltas": torch.zeros(2, 5, 4),
        "logits": torch.zeros(2, 5, 3),
        "anchors_cxcywh": torch.ones(5, 4),
    }
    with pytest.raises(ValueError, match=f"^{name} "):
        decode_nms(**{**good, name: value})
