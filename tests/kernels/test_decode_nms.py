"""The compiled decoding and suppression against the plain version, on every device at hand."""

import math
from typing import Any

import pytest
import torch
from box_samples import grid_boxes, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_samples import (
    FLOATS,
    INF,
    NAN,
    DecodeInput,
    assert_detections_close,
    assert_same_bits,
    decode_input,
    pyramid_anchors,
    random_predictions,
    strided,
    widened,
)
from torch import Tensor

from kernels import Detections, decode_nms, reference
from kernels.boxes import iou_matrix, ltrb_to_cxcywh


def check_invariants(
    found: Detections, *, num_classes: int, score_threshold: float, iou_threshold: float, max_per_class: int
) -> None:
    places = torch.arange(found.scores.shape[1], device=found.scores.device)
    within = places < found.counts[:, None]  # [B, D]
    assert found.counts.ge(0).all()
    assert found.counts.le(found.scores.shape[1]).all()
    assert found.scores[within].gt(score_threshold).all()
    assert found.scores[within].le(1).all()
    assert found.labels[within].ge(1).all()
    assert found.labels[within].lt(num_classes).all()
    assert found.scores.diff(dim=1).le(0).all()
    for values in (found.boxes_ltrb, found.scores, found.labels):
        assert values[~within].eq(0).all()
    for image in range(found.counts.numel()):
        for label in found.labels[image, within[image]].unique():
            boxes = found.boxes_ltrb[image, within[image] & (found.labels[image] == label)]
            assert len(boxes) <= max_per_class
            assert iou_matrix(boxes, boxes).triu(1).lt(max(iou_threshold, 1e-12)).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "sizes",
    [(3, 8_732, 81), (2, 15_130, 81), (1, 100_000, 3), (1, 700, 1_000), (3, 37, 5), (2, 1, 2), (1, 257, 91)],
    ids=str,
)
def test_detections_are_those_of_the_plain_version(
    device: torch.device, sizes: tuple[int, int, int], dtype: torch.dtype
) -> None:
    values = decode_input(*sizes, dtype)
    found = decode_nms(*values.to(device))
    assert sizes[1] < 100 or found.counts.gt(5).all()
    assert_detections_close(found, reference.decode_nms(*widened(values)))


@settings(deadline=None)
@given(
    boxes=st.lists(grid_boxes, min_size=1, max_size=30),
    seed=st.integers(0, 10**6),
    levels=st.integers(1, 4),
    score_threshold=st.sampled_from([0.0, 0.05, 0.25, 0.5]),
    iou_threshold=st.sampled_from([0.5, 0.3, 0.25, 0.0, 1.0]),
    max_per_class=st.sampled_from([1, 3, 200]),
    max_detections=st.sampled_from([1, 5, 200]),
)
def test_exact_ties_fall_as_in_the_plain_version(
    device: torch.device,
    boxes: list,
    seed: int,
    levels: int,
    score_threshold: float,
    iou_threshold: float,
    max_per_class: int,
    max_detections: int,
) -> None:
    limits = {"max_per_class": max_per_class, "max_detections": max_detections}
    options: dict[str, Any] = {"score_threshold": score_threshold, "iou_threshold": iou_threshold, **limits}
    anchors = ltrb_to_cxcywh(torch.tensor(boxes))
    generator = seeded(seed)
    rows = torch.randn(levels, 4, generator=generator)
    rows[0] = 0  # probability 1/4 for every class: equal scores within an anchor, too
    logits = rows[torch.randint(0, levels, (2, len(boxes)), generator=generator)]
    values = DecodeInput(torch.zeros(2, len(boxes), 4), logits, anchors)
    found, expected = decode_nms(*values.to(device), **options), reference.decode_nms(*values, **options)
    assert_same_bits((found.boxes_ltrb, found.labels), (expected.boxes_ltrb, expected.labels))
    assert_detections_close(found, expected)


@settings(deadline=None)
@given(
    seed=st.integers(0, 10**6),
    num_anchors=st.integers(1, 60),
    num_classes=st.integers(2, 6),
    score_threshold=st.floats(0, 0.6),
    iou_threshold=st.floats(0.05, 1),
    max_per_class=st.integers(1, 70),
    max_detections=st.integers(1, 70),
)
def test_kept_boxes_of_a_class_do_not_overlap_and_rows_are_sorted_and_within_range(
    device: torch.device,
    seed: int,
    num_anchors: int,
    num_classes: int,
    score_threshold: float,
    iou_threshold: float,
    max_per_class: int,
    max_detections: int,
) -> None:
    found = decode_nms(
        *random_predictions(2, num_anchors, num_classes, seed).to(device),
        score_threshold=score_threshold,
        iou_threshold=iou_threshold,
        max_per_class=max_per_class,
        max_detections=max_detections,
    )
    check_invariants(
        found,
        num_classes=num_classes,
        score_threshold=score_threshold,
        iou_threshold=iou_threshold,
        max_per_class=max_per_class,
    )


@pytest.mark.parametrize("limits", [(1, 1), (1, 200), (200, 1), (200, 200), (3_000, 50_000), (2**62, 7)], ids=str)
@pytest.mark.parametrize("score_threshold", [0.0, 0.05])
def test_every_anchor_in_every_class(device: torch.device, limits: tuple[int, int], score_threshold: float) -> None:
    options: dict[str, Any] = {
        "score_threshold": score_threshold,
        "max_per_class": limits[0],
        "max_detections": limits[1],
    }
    values = random_predictions(1, 600, 9)
    found = decode_nms(*values.to(device), **options)
    assert found.counts.gt(0).all()
    assert_detections_close(found, reference.decode_nms(*widened(values), **options))


def test_every_anchor_of_the_network_in_every_class(device: torch.device) -> None:
    values = random_predictions(1, 8_732, 81)
    found = decode_nms(*values.to(device), score_threshold=0.0)
    assert_detections_close(found, reference.decode_nms(*widened(values), score_threshold=0.0))


@pytest.mark.parametrize("iou_threshold", [0.5, 1.0])
def test_of_identical_boxes_with_identical_scores_one_remains(device: torch.device, iou_threshold: float) -> None:
    anchors = torch.tensor([[0.5, 0.5, 0.25, 0.25]]).repeat(300, 1)
    values = DecodeInput(torch.zeros(2, 300, 4), torch.zeros(2, 300, 3), anchors).to(device)
    found = decode_nms(*values, iou_threshold=iou_threshold, max_per_class=1_000, max_detections=1_000)
    assert found.counts.tolist() == [2, 2]
    assert found.labels[:, :3].tolist() == [[1, 2, 0]] * 2
    assert found.boxes_ltrb[:, 0].tolist() == [[0.375, 0.375, 0.625, 0.625]] * 2


@pytest.mark.parametrize("score_threshold", [0.05, 1.0])
def test_where_nothing_is_likely_enough_every_row_is_zero(device: torch.device, score_threshold: float) -> None:
    values = random_predictions(2, 500, 6).to(device)
    values.logits[..., 0] += 20
    found = decode_nms(*values, score_threshold=score_threshold)
    assert not any(tensor.any() for tensor in found)
    assert found.scores.shape == (2, 200)


def test_probability_or_overlap_of_exactly_the_threshold_is_dropped(device: torch.device) -> None:
    even = DecodeInput(torch.zeros(1, 2, 4), torch.zeros(1, 2, 2), pyramid_anchors(2)).to(device)
    assert decode_nms(*even, score_threshold=0.5).counts.tolist() == [0]
    assert decode_nms(*even, score_threshold=math.nextafter(0.5, 0) - 1e-7).counts.gt(0).all()
    boxes = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 0.5], [0, 0, 0.25, 0.4375]])
    logits = torch.tensor([[[0, 3.0], [0, 2.0], [0, 1.0]]])
    values = DecodeInput(torch.zeros(1, 3, 4), logits, ltrb_to_cxcywh(boxes)).to(device)
    assert decode_nms(*values, iou_threshold=0.5).boxes_ltrb[0, :2].tolist() == boxes[[0, 2]].tolist()


@pytest.mark.parametrize("score_threshold", [1e-6, 1e-3, 0.05, 0.5])
def test_no_probability_just_above_the_threshold_is_missed(device: torch.device, score_threshold: float) -> None:
    steps = (torch.arange(-300, 300) + 0.5) * 1e-5
    log_odds = math.log(score_threshold / (1 - score_threshold)) + steps
    logits = torch.stack((torch.zeros(600), log_odds), dim=-1)[None]
    values = DecodeInput(torch.zeros(1, 600, 4), logits, pyramid_anchors(600)).to(device)
    found = decode_nms(
        *values, score_threshold=score_threshold, iou_threshold=1.0, max_per_class=600, max_detections=600
    )
    expected = log_odds.double().sigmoid().gt(score_threshold).sum()
    assert found.counts.tolist() == [expected]
    assert expected == 300


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("name", ["deltas", "logits", "anchors_cxcywh"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_an_anchor_with_a_number_that_is_not_finite_gives_no_detection(
    device: torch.device, name: str, value: float, dtype: torch.dtype
) -> None:
    for column in range(4):
        boxes = torch.tensor([[0, 0, 0.25, 0.25], [0.5, 0, 0.75, 0.25], [0, 0.5, 0.25, 0.75]])
        anchors = ltrb_to_cxcywh(boxes)
        values = DecodeInput(torch.zeros(1, 3, 4, dtype=dtype), torch.zeros(1, 3, 5, dtype=dtype), anchors)
        getattr(values, name)[..., 1, column] = value
        found = decode_nms(*values.to(device))
        assert found.counts.tolist() == [8]
        assert sorted(map(tuple, found.boxes_ltrb[0, :8].unique(dim=0).tolist())) == sorted(
            map(tuple, boxes[[0, 2]].tolist())
        )


def test_a_box_too_large_for_float32_gives_no_detection(device: torch.device) -> None:
    values = DecodeInput(torch.zeros(2, 4, 4), torch.zeros(2, 4, 2), pyramid_anchors(4)).to(device)
    values.deltas[0, 2, 3] = 1_000
    values.deltas[1, 1, 0] = 3.4e38
    values.anchors_cxcywh[1, 2] = 20
    assert decode_nms(*values, iou_threshold=1.0).counts.tolist() == [3, 3]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_storage_and_number_types_of_the_input_do_not_matter(device: torch.device, dtype: torch.dtype) -> None:
    values = decode_input(3, 300, 7, dtype).to(device)
    plain = decode_nms(*values)
    assert plain.counts.gt(5).all()
    assert_same_bits(decode_nms(*(strided(x) for x in values)), plain)
    wide = torch.cat(values[:2], dim=-1)
    assert_same_bits(decode_nms(wide[..., :4], wide[..., 4:], values.anchors_cxcywh), plain)
    shifted = [torch.cat((x.new_zeros(1), x.flatten()))[1:].view_as(x) for x in values]
    assert_same_bits(decode_nms(*shifted), plain)
    assert_same_bits(decode_nms(values.deltas.float(), values.logits, values.anchors_cxcywh.double()), plain)
    assert_same_bits(decode_nms(values.deltas, values.logits.float(), values.anchors_cxcywh), plain)
    repeated = [values.deltas[:1].expand(3, -1, -1), values.logits[:1].expand(3, -1, -1), values.anchors_cxcywh]
    for tensor in decode_nms(*repeated):
        assert_same_bits((tensor[1], tensor[2]), (tensor[0], tensor[0]))


@pytest.mark.parametrize(("batch_size", "num_anchors"), [(0, 5), (2, 0), (0, 0)])
def test_empty_input_has_no_detections(device: torch.device, batch_size: int, num_anchors: int) -> None:
    found = decode_nms(*random_predictions(batch_size, num_anchors, 3).to(device))
    assert found.boxes_ltrb.shape == (batch_size, 200, 4)
    assert found.counts.tolist() == [0] * batch_size
    assert not found.boxes_ltrb.any()


@pytest.mark.parametrize("max_detections", [2**31, 2**40, 2**62, 2**63 - 1])
def test_more_detections_than_can_be_counted_are_an_error(device: torch.device, max_detections: int) -> None:
    with pytest.raises(ValueError, match=rf"max_detections = {max_detections}: expected 1 to 2147483647"):
        decode_nms(*random_predictions(1, 5, 3).to(device), max_detections=max_detections)


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("deltas", torch.zeros(2, 4), r"has shape \[2, 4\]: expected \[any, any, 4\]"),
        ("deltas", torch.zeros(2, 5, 4, dtype=torch.int64), "is torch.int64: expected float16, bfloat16"),
        ("logits", torch.zeros(2, 4, 3), r"has shape \[2, 4, 3\]: expected \[2, 5, any\]"),
        ("logits", torch.zeros(2, 5, 1), r"has shape \[2, 5, 1\]: expected at least 2 classes"),
        ("logits", torch.zeros(2, 5, 3, dtype=torch.uint8), "is torch.uint8: expected float16, bfloat16"),
        ("anchors_cxcywh", torch.zeros(4, 4), r"has shape \[4, 4\]: expected \[5, 4\]"),
        ("anchors_cxcywh", torch.zeros(5, 4, dtype=torch.int64), "is torch.int64: expected float16, bfloat16"),
        ("score_threshold", 1.5, "= 1.5: expected 0 to 1"),
        ("score_threshold", NAN, "= nan: expected 0 to 1"),
        ("iou_threshold", -0.5, "= -0.5: expected 0 to 1"),
        ("max_per_class", 0, "= 0: expected at least 1"),
        ("max_detections", -1, "= -1: expected 1 to 2147483647"),
    ],
)
def test_bad_input_is_named(device: torch.device, name: str, value: Any, complaint: str) -> None:
    inputs: dict[str, Any] = random_predictions(2, 5, 3).to(device)._asdict()
    inputs[name] = value.to(device) if isinstance(value, Tensor) else value
    with pytest.raises(ValueError, match=f"^{name} {complaint}"):
        decode_nms(**inputs)


def test_float64_is_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match=r"^deltas is torch\.float64: expected float16, bfloat16 or float32"):
        decode_nms(*widened(random_predictions(2, 5, 3)).to(device))
