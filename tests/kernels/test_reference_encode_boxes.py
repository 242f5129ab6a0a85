"""The plain target encoding against a loop over Python numbers, and rule by rule."""

import math
import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from box_samples import FLOAT64, boxes_of, grid_boxes, loop_iou, random_boxes, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.boxes import decode_deltas, ltrb_to_cxcywh
from kernels.reference import encode_boxes


def encode_one(boxes: Tensor, anchors_ltrb: Tensor, **options: Any) -> list[int]:
    """Labels of the anchors for one image whose ground truths are labelled 1, 2, 3, ..."""
    labels = torch.arange(1, len(boxes) + 1)
    offsets = torch.tensor([0, len(boxes)])
    return encode_boxes(boxes, labels, offsets, ltrb_to_cxcywh(anchors_ltrb), **options).labels[0].tolist()


def loop_match(boxes: list[list[float]], anchors_ltrb: list[list[float]], ranks: list[int]) -> list[int]:
    """1 + the ground truth of every anchor, or 0."""
    ious = [[loop_iou(box, anchor) for anchor in anchors_ltrb] for box in boxes]
    owners = []
    for anchor in range(len(anchors_ltrb)):
        best, best_iou = 0, 0.5
        for number, row in enumerate(ious, start=1):
            if row[anchor] > best_iou:
                best, best_iou = number, row[anchor]
        owners.append(best)
    for number, row in enumerate(ious, start=1):
        wanted, *others = sorted(range(len(anchors_ltrb)), key=ranks.__getitem__)
        for anchor in others:
            if row[anchor] > row[wanted]:
                wanted = anchor
        owners[wanted] = number
    return owners


@settings(deadline=None)
@given(st.lists(grid_boxes, min_size=1, max_size=6), st.lists(grid_boxes, min_size=1, max_size=12), st.randoms())
def test_matching_equals_a_loop_over_all_pairs(boxes: list, anchors: list, shuffler: random.Random) -> None:
    ranks = list(range(len(anchors)))
    assert encode_one(boxes_of(*boxes), boxes_of(*anchors)) == loop_match(boxes, anchors, ranks)
    shuffler.shuffle(ranks)
    found = encode_one(boxes_of(*boxes), boxes_of(*anchors), tie_ranks=torch.tensor(ranks))
    assert found == loop_match(boxes, anchors, ranks)


def test_iou_of_exactly_the_threshold_is_background() -> None:
    box = boxes_of((0, 0, 1, 1))
    half, more = (0, 0, 1, 0.5), (0, 0, 1, 0.5625)
    assert encode_one(box, boxes_of((0, 0, 1, 1), half, more)) == [1, 0, 1]
    assert encode_one(box, boxes_of((0, 0, 1, 1), half, more), iou_threshold=0.5625) == [1, 0, 0]


def test_every_ground_truth_forces_its_best_anchor() -> None:
    tiny = boxes_of((0.5, 0.5, 0.5625, 0.5625))
    assert encode_one(tiny, boxes_of((0, 0, 0.5, 0.5), (0.5, 0.5, 1, 1), (0, 0, 1, 1))) == [0, 1, 0]


def test_forcing_takes_an_anchor_from_a_ground_truth_that_overlaps_it_better() -> None:
    boxes = boxes_of((0, 0, 1, 1), (0, 0, 0.5, 0.5))
    assert encode_one(boxes, boxes_of((0, 0, 1, 1), (0, 0, 1, 0.875))) == [1, 2]
    assert encode_one(boxes, boxes_of((0, 0, 1, 1))) == [2]


def test_the_last_ground_truth_gets_a_shared_best_anchor() -> None:
    boxes = boxes_of((0, 0, 0.5, 1), (0, 0, 1, 0.5), (0, 0.5, 1, 1))
    assert encode_one(boxes, boxes_of((0, 0, 1, 1), (2, 2, 3, 3))) == [3, 0]


def test_the_first_ground_truth_wins_an_equal_overlap_that_neither_forces() -> None:
    same = (0, 0, 0.5, 1)
    assert encode_one(boxes_of(same, same), boxes_of(same, (0, 0, 0.5, 0.75))) == [2, 1]


def test_tie_ranks_decide_between_equally_good_anchors() -> None:
    box, anchors = boxes_of((0, 0, 0.25, 0.25)), boxes_of((0, 0, 0.5, 1), (0, 0, 1, 0.5), (0, 0, 1, 1))
    assert encode_one(box, anchors) == [1, 0, 0]
    assert encode_one(box, anchors, tie_ranks=torch.tensor([1, 0, 2])) == [0, 1, 0]
    assert encode_one(box, anchors, tie_ranks=torch.tensor([2, 1, 0])) == [0, 1, 0]  # the last overlaps less


def test_images_of_a_batch_do_not_mix_and_those_without_boxes_are_background() -> None:
    generator = seeded(3)
    counts = [2, 0, 5, 1, 0]
    boxes, anchors = random_boxes(sum(counts), generator, FLOAT64), ltrb_to_cxcywh(random_boxes(30, generator, FLOAT64))
    labels = torch.randint(1, 9, (sum(counts),), generator=generator)
    offsets = torch.tensor([0, *counts]).cumsum(0)
    batch = encode_boxes(boxes, labels, offsets, anchors)
    assert batch.labels.dtype == torch.int32
    for image, (begin, end) in enumerate(pairwise(offsets.tolist())):
        alone = encode_boxes(boxes[begin:end], labels[begin:end], torch.tensor([0, end - begin]), anchors)
        assert torch.equal(batch.labels[image], alone.labels[0])
        assert torch.equal(batch.deltas[image], alone.deltas[0])
        assert bool(batch.labels[image].any()) == (end > begin)


def test_positive_rows_decode_to_their_ground_truth_and_background_rows_are_zero() -> None:
    generator = seeded(4)
    boxes, anchors = random_boxes(6, generator, FLOAT64), ltrb_to_cxcywh(random_boxes(200, generator, FLOAT64))
    targets = encode_boxes(boxes, torch.arange(1, 7), torch.tensor([0, 6]), anchors)
    labels, positive = targets.labels[0], targets.labels[0] > 0
    assert 6 <= positive.sum() < 200
    torch.testing.assert_close(
        decode_deltas(targets.deltas[0, positive], anchors[positive]), boxes[labels[positive].long() - 1]
    )
    assert targets.deltas[0, ~positive].eq(0).all()


def test_an_empty_batch_gives_empty_targets() -> None:
    anchors = ltrb_to_cxcywh(boxes_of((0, 0, 1, 1)))
    none = torch.zeros(0, dtype=torch.int64)
    assert encode_boxes(boxes_of(), none, torch.tensor([0]), anchors).labels.shape == (0, 1)
    assert encode_boxes(boxes_of(), none, torch.tensor([0, 0, 0]), anchors).deltas.eq(0).all()


def test_float32_agrees_with_float64() -> None:
    generator = seeded(5)
    boxes, anchors = random_boxes(9, generator, torch.float32), ltrb_to_cxcywh(random_boxes(300, generator, FLOAT64))
    labels, offsets = torch.arange(1, 10), torch.tensor([0, 4, 9])
    single, double = (
        encode_boxes(boxes, labels, offsets, anchors),
        encode_boxes(boxes.double(), labels, offsets, anchors),
    )
    assert single.deltas.dtype == torch.float32
    assert torch.equal(single.labels, double.labels)
    torch.testing.assert_close(single.deltas.double(), double.deltas, rtol=0, atol=2e-5)


def test_non_contiguous_input_gives_the_same() -> None:
    generator = seeded(6)
    boxes, anchors = random_boxes(5, generator, FLOAT64), ltrb_to_cxcywh(random_boxes(40, generator, FLOAT64))
    labels, offsets = torch.arange(1, 6), torch.tensor([0, 2, 5])
    plain = encode_boxes(boxes, labels, offsets, anchors)
    odd = encode_boxes(boxes.T.contiguous().T, labels.repeat_interleave(2)[::2], offsets, anchors.T.contiguous().T)
    assert torch.equal(plain.deltas, odd.deltas)
    assert torch.equal(plain.labels, odd.labels)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("boxes_ltrb", boxes_of((0, 0, 1, 1), (0.5, 0, 0.5, 1))),
        ("boxes_ltrb", boxes_of((0, 0, 1, 1), (0, 0.5, 1, 0.25))),
        ("boxes_ltrb", boxes_of((0, 0, 1, 1), (0, 0, 1, math.inf))),
        ("boxes_ltrb", boxes_of((0, 0, 1, 1), (0, 0, 1, math.nan))),
        ("boxes_ltrb", torch.ones(2, 5)),
        ("boxes_ltrb", boxes_of((0, 0, 1, 1), (0, 0, 1, 1)).half()),
        ("labels", torch.tensor([1, 0])),
        ("labels", torch.tensor([1.0, 2.0])),
        ("labels", torch.tensor([1])),
        ("offsets", torch.tensor([0, 1])),
        ("offsets", torch.tensor([1, 2])),
        ("offsets", torch.tensor([0, 2, 1, 2])),
        ("offsets", torch.tensor([], dtype=torch.int64)),
        ("offsets", torch.tensor([0.0, 2.0])),
        ("anchors_cxcywh", torch.ones(3)),
        ("anchors_cxcywh", torch.ones(0, 4)),
        ("tie_ranks", torch.tensor([0, 1])),
        ("boxes_ltrb", torch.ones(2, 4, device="meta")),
    ],
)
def test_bad_input_is_named(name: str, value: Tensor) -> None:
    good: dict[str, Any] = {
        "boxes_ltrb": boxes_of((0, 0, 1, 1), (0, 0, 0.5, 0.5)),
        "labels": torch.tensor([1, 2]),
        "offsets": torch.tensor([0, 2]),
        "anchors_cxcywh": ltrb_to_cxcywh(boxes_of((0, 0, 1, 1), (0, 0, 1, 0.5), (0.5, 0, 1, 1))),
    }
    with pytest.raises(ValueError, match=r"^labels is on" if value.is_meta else f"^{name}"):
        encode_boxes(**{**good, name: value})
