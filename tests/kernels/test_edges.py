"""Sizes around every tile, warp and limit of the operators, on every device at hand, against the plain versions."""

import math
from typing import Any

import pytest
import torch
from box_samples import random_boxes, seeded
from operator_samples import (
    BY_CUDA_SOURCES,
    FLOATS,
    INF,
    NAN,
    DecodeInput,
    GroundTruths,
    LossInput,
    assert_detections_close,
    assert_loss_equals_plain,
    assert_same_bits,
    assert_targets_equal,
    decode_input,
    ground_truths,
    loss_input,
    pyramid_anchors,
    random_predictions,
    run_loss,
    widened,
)
from torch import Tensor

from kernels import decode_nms, encode_boxes, multibox_loss, reference
from kernels.boxes import ltrb_to_cxcywh

WARPS_AND_BLOCKS = (1, 2, 3, 7, 8, 9, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1023, 1024, 1025)
# Rows of classes: in one go of a warp's lanes up to 96; in shared memory up to 1,536 16-bit ones.
CLASSES = (2, 3, 7, 8, 9, 16, 17, 80, 81, 95, 96, 97, 193, 384, 385, 768, 769, 1536, 1537, 3073)


def check_targets(device: torch.device, truths: GroundTruths, anchors: Tensor, **options: Any) -> None:
    placed: dict[str, Any] = {
        key: value.to(device) if isinstance(value, Tensor) else value for key, value in options.items()
    }
    found = encode_boxes(*truths.to(device), anchors.to(device), **placed)
    assert_targets_equal(found, reference.encode_boxes(*truths, anchors, **options))


def check_detections(device: torch.device, values: DecodeInput, **options: Any) -> None:
    found = decode_nms(*values.to(device), **options)
    assert_detections_close(found, reference.decode_nms(*widened(values), **options))


@pytest.mark.parametrize("num_anchors", [*WARPS_AND_BLOCKS, 2049])
def test_targets_by_number_of_anchors(device: torch.device, num_anchors: int) -> None:
    truths, anchors = ground_truths([0, 3, 1, 17, 0], seed=num_anchors), pyramid_anchors(num_anchors)
    ranks = torch.randperm(num_anchors, generator=seeded(5))
    for options in ({}, {"tie_ranks": ranks}, {"iou_threshold": 0.0}, {"iou_threshold": 1.0}):
        check_targets(device, truths, anchors, **options)


@pytest.mark.parametrize(
    "counts", [[0], [1], [31, 0, 33], [255], [0, 256, 0], [257, 2], [2, 511], [513], [3000, 1]], ids=str
)
def test_targets_by_number_of_boxes(device: torch.device, counts: list[int]) -> None:
    truths, anchors = ground_truths(counts, seed=sum(counts)), pyramid_anchors(200)
    check_targets(device, truths, anchors)
    check_targets(device, truths, anchors, tie_ranks=torch.randperm(200, generator=seeded(6)))


@pytest.mark.parametrize("copies", [2, 255, 256, 300])
def test_targets_of_the_same_boxes_again_and_again(device: torch.device, copies: int) -> None:
    boxes = random_boxes(3, seeded(3)).repeat(copies, 1)
    boxes[copies] += 7  # one that overlaps nothing, in the middle
    offsets = torch.tensor([0, len(boxes) // 2, len(boxes)])
    truths = GroundTruths(boxes, torch.arange(1, len(boxes) + 1), offsets)
    for anchors in (pyramid_anchors(100), pyramid_anchors(100)[:1].repeat(70, 1)):
        ranks = torch.randperm(len(anchors), generator=seeded(6))
        check_targets(device, truths, anchors)
        check_targets(device, truths, anchors, tie_ranks=ranks, iou_threshold=0.1)


def test_targets_whose_best_box_has_equals_and_betters_far_from_it(device: torch.device) -> None:
    corners = torch.tensor([[0, 0, 0.5, 0.5], [0.5, 0, 1, 0.5], [0, 0, 1, 1], [0.25, 0.25, 0.5, 0.5]])
    generator = seeded(0)
    for threshold in (0.0, 0.25, 0.5):
        corner = torch.randint(0, 4, (900, 2), generator=generator) / 8
        size = torch.randint(1, 5, (900, 2), generator=generator) / 8
        boxes = torch.cat((corner, corner + size), dim=1)
        truths = GroundTruths(boxes, torch.arange(1, 901), torch.tensor([0, 30, 900]))
        check_targets(device, truths, ltrb_to_cxcywh(corners), iou_threshold=threshold)


@BY_CUDA_SOURCES
def test_boxes_that_a_gpu_leaves_out_may_be_anywhere(device: torch.device) -> None:
    generator = seeded(4)
    boxes, labels = random_boxes(700, generator), torch.arange(1, 701)
    bad = torch.rand(700, generator=generator) < 0.3
    bad[:5] = True
    boxes[bad, 2] = boxes[bad, 0]
    ends = torch.tensor([0, 5, 300, 700])
    kept_ends = torch.cat((torch.zeros(1, dtype=torch.int64), (~bad).cumsum(0)))[ends]
    anchors = pyramid_anchors(150)
    found = encode_boxes(boxes.to(device), labels.to(device), ends.to(device), anchors.to(device))
    assert_targets_equal(found, reference.encode_boxes(boxes[~bad], labels[~bad], kept_ends, anchors))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_an_anchor_that_is_not_finite_gets_no_box(device: torch.device, value: float) -> None:
    truths, anchors = ground_truths([5, 0]).to(device), pyramid_anchors(40)
    for column in range(4):
        odd = anchors.clone()
        odd[7, column] = value
        found = encode_boxes(*truths, odd.to(device))
        assert found.labels[0, 7] == 0
        assert found.labels[0].gt(0).any()


@pytest.mark.parametrize("num_anchors", WARPS_AND_BLOCKS)
def test_losses_by_number_of_anchors(device: torch.device, num_anchors: int) -> None:
    for classes, dtype in ((3, torch.float16), (81, torch.float32)):
        share = 0.1 + 1 / num_anchors
        assert_loss_equals_plain(
            device, loss_input(2, num_anchors, classes, dtype, positive_share=share, seed=num_anchors)
        )


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
@pytest.mark.parametrize("num_classes", CLASSES)
def test_losses_by_number_of_classes(device: torch.device, num_classes: int, dtype: torch.dtype) -> None:
    assert_loss_equals_plain(device, loss_input(2, 67, num_classes, dtype, positive_share=0.05, seed=num_classes))


@pytest.mark.parametrize(("base", "step"), [(20.0, 2.0**-16), (0.0, 1e-3), (8.0, 2.0**-12), (1000.0, 1.0), (16.0, 3.0)])
def test_losses_that_differ_in_any_of_their_bytes(device: torch.device, base: float, step: float) -> None:
    values = loss_input(2, 1500, 2, positive_share=0.02, seed=8)
    orders = torch.stack([torch.randperm(1500, generator=seeded(i)) for i in (1, 2)])
    values.logits[..., 1] = base + step * orders
    values.logits[..., 0] = 0
    assert_loss_equals_plain(device, values)


@pytest.mark.parametrize("value", [0.0, -50.0, 1000.0])
@pytest.mark.parametrize("num_anchors", [5, 300, 2000])
def test_losses_that_are_all_equal(device: torch.device, num_anchors: int, value: float) -> None:
    values = loss_input(3, num_anchors, 4, positive_share=0.0)
    values.target_labels[0, ::7] = 2
    values.target_labels[1, -1] = 1
    values.logits[:] = value
    assert_loss_equals_plain(device, values)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_losses_of_rows_that_start_at_any_element(device: torch.device, dtype: torch.dtype) -> None:
    values = loss_input(2, 133, 7, dtype, positive_share=0.1).to(device)
    ones = torch.ones(2, 2)
    plain = run_loss(multibox_loss, values, *ones)
    for shift in range(1, 9):
        shifted = [torch.cat((x.new_zeros(shift), x.flatten()))[shift:].view_as(x) for x in values]
        assert_same_bits(run_loss(multibox_loss, LossInput(*shifted), *ones), plain)


@pytest.mark.parametrize("num_anchors", WARPS_AND_BLOCKS)
def test_detections_by_number_of_anchors(device: torch.device, num_anchors: int) -> None:
    values = random_predictions(2, num_anchors, 5, seed=num_anchors)
    for options in ({}, {"score_threshold": 0.0}, {"max_per_class": 1}, {"max_detections": 1}):
        check_detections(device, values, **options)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("num_classes", CLASSES)
def test_detections_by_number_of_classes(device: torch.device, num_classes: int, dtype: torch.dtype) -> None:
    check_detections(device, decode_input(2, 67, num_classes, dtype, seed=num_classes))


@pytest.mark.parametrize(
    ("max_per_class", "max_detections"),
    [
        (1, 5000),
        (2, 1),
        (127, 200),
        (128, 1024),
        (129, 1025),
        (1023, 200),
        (1024, 1),
        (1025, 2999),
        (1500, 5000),
        (10_000, 1024),
    ],
)
def test_detections_by_limits(device: torch.device, max_per_class: int, max_detections: int) -> None:
    values = random_predictions(1, 1_500, 3)
    limits = {"max_per_class": max_per_class, "max_detections": max_detections}
    check_detections(device, values, score_threshold=0.0, iou_threshold=0.95, **limits)


@pytest.mark.parametrize("num_anchors", [1, 3, 1024, 1025, 1300])
@pytest.mark.parametrize("limit", [1, 3, 1025, 10**6])
def test_detections_of_equal_scores(device: torch.device, num_anchors: int, limit: int) -> None:
    zeros = torch.zeros(2, num_anchors, 4), torch.zeros(2, num_anchors, 3)
    values = DecodeInput(*zeros, pyramid_anchors(num_anchors))
    for iou_threshold in (0.0, 0.5, 1.0):
        options: dict[str, Any] = {"iou_threshold": iou_threshold, "max_per_class": limit}
        options["max_detections"] = min(limit, 4 * num_anchors)
        found, expected = decode_nms(*values.to(device), **options), reference.decode_nms(*values, **options)
        assert_same_bits(
            (found.boxes_ltrb, found.labels, found.counts), (expected.boxes_ltrb, expected.labels, expected.counts)
        )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["deltas", "logits"])
def test_detections_where_much_is_not_finite(device: torch.device, name: str, value: float) -> None:
    for dtype in FLOATS:
        plain = random_predictions(2, 70, 9)
        values = DecodeInput(plain.deltas.to(dtype), plain.logits.to(dtype), plain.anchors_cxcywh)
        hit = torch.rand(2, 70, generator=seeded(2)) < 0.4
        tensor = getattr(values, name)
        tensor[hit, torch.randint(0, tensor.shape[-1], (int(hit.sum()),), generator=seeded(3))] = value
        check_detections(device, values, score_threshold=0.01)


def test_detections_of_a_batch_whose_lists_do_not_fit_into_the_workspace_at_once(device: torch.device) -> None:
    num_anchors, num_classes = 20_000, 841  # 134 MB of lists an image
    values = DecodeInput(
        torch.zeros(3, num_anchors, 4, dtype=torch.float16),
        torch.zeros(3, num_anchors, num_classes, dtype=torch.float16),
        pyramid_anchors(num_anchors),
    )
    values.logits[..., 0] = 12
    generator = seeded(1)
    for image in range(3):
        places = torch.randint(0, num_anchors, (300,), generator=generator)
        values.logits[image, places, torch.randint(1, num_classes, (300,), generator=generator)] = 15
    found = decode_nms(*values.to(device))
    assert found.counts.gt(100).all()
    for image in range(3):
        own = slice(image, image + 1)
        alone = decode_nms(*DecodeInput(values.deltas[own], values.logits[own], values.anchors_cxcywh).to(device))
        assert_same_bits(tuple(part[image : image + 1] for part in found), tuple(alone))


@pytest.mark.parametrize("limits", [(1, 1), (2, 5), (5, 2)])
def test_detections_without_anchors(device: torch.device, limits: tuple[int, int]) -> None:
    found = decode_nms(*random_predictions(2, 0, 3).to(device), max_per_class=limits[0], max_detections=limits[1])
    assert found.scores.shape == (2, limits[1])
    assert not found.scores.any()
    assert not found.counts.any()
