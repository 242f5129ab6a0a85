"""The inputs of the operators are what they are called, and the other implementations find the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from repository import REPOSITORY
from torch import Tensor

from kernels import reference
from ssd_fast.config.recipe import load_config
from ssd_fast.model.anchors import model_anchors
from ssd_fast.profiling import operator_cases

SSD300, DEMO = (REPOSITORY / "configs" / f"{name}.toml" for name in ("ssd300", "demo"))
PREDICTIONS = (
    operator_cases.network_like,
    operator_cases.every_anchor,
    operator_cases.identical_boxes,
    operator_cases.no_candidates,
)


def anchors_of(recipe: Path) -> Tensor:
    return model_anchors(load_config(recipe).model)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def above_threshold(logits: Tensor) -> Tensor:
    """[B, A, C - 1] bool, the candidates."""
    return logits.softmax(dim=-1)[..., 1:] > 0.05


def test_network_like_predictions_have_350_candidates_in_clusters_of_many_classes() -> None:
    anchors = anchors_of(SSD300)
    deltas, logits = operator_cases.network_like(anchors, 4, generator())
    candidates = above_threshold(logits)
    assert all(300 < count <= 350 for count in candidates.sum(dim=(1, 2)).tolist())
    assert all(count > 30 for count in candidates.any(dim=1).sum(dim=1).tolist())
    kept = reference.decode_nms(deltas, logits, anchors).counts
    assert all(60 < count < 200 for count in kept.tolist())  # suppression has something to do
    assert logits[~candidates.any(dim=2)].argmax(dim=-1).eq(0).all()


@pytest.mark.parametrize("make_input", [operator_cases.every_anchor, operator_cases.identical_boxes])
def test_every_anchor_has_as_many_candidates_as_can_be_in_half_precision_too(make_input: Any) -> None:
    anchors = anchors_of(DEMO)
    deltas, logits = make_input(anchors, 2, generator())
    for values in (logits, logits.half().float()):
        assert above_threshold(values).sum(dim=2).eq(19).all()
    boxes = reference.decode_deltas(deltas, anchors)
    assert (make_input is operator_cases.identical_boxes) == torch.allclose(boxes, boxes[:1, :1], atol=1e-5)


def test_no_candidates_are_none() -> None:
    assert not above_threshold(operator_cases.no_candidates(anchors_of(SSD300), 2, generator())[1]).any()


def test_anchors_that_rounding_decides_are_those_of_equal_overlap() -> None:
    anchors = torch.tensor([[0, 0, 2, 2], [0, 0, 2, 1], [0, 0, 1, 2], [4, 4, 6, 6], [4, 4, 6, 5], [8, 8, 9, 9]]).float()
    boxes = torch.tensor([[0, 0, 1, 1], [4, 4, 6, 6]]).float()  # overlap anchors 1 and 2 equally; 3 best, 4 by a half
    decided = operator_cases.decided_by_rounding(reference.iou_matrix(boxes, anchors))
    assert decided.tolist() == [False, True, True, False, True, False]
    twins = torch.tensor([[4, 4, 6, 6], [4, 4, 6, 6]]).float()
    assert operator_cases.decided_by_rounding(reference.iou_matrix(twins, anchors)).tolist()[3:5] == [True, True]


@pytest.mark.parametrize("make_input", PREDICTIONS, ids=lambda make_input: make_input.__name__)
def test_torchvisions_ways_find_what_the_oracle_finds(make_input: Any) -> None:
    anchors = anchors_of(DEMO)
    predictions = make_input(anchors, 2, generator())
    deltas, logits = predictions
    expected = reference.decode_nms(deltas, logits, anchors)
    for decode in (operator_cases.decode_per_class, operator_cases.decode_batched):
        found = decode(deltas, logits, anchors)
        assert torch.equal(found.counts, expected.counts)
        torch.testing.assert_close(found.scores, expected.scores)
        assert operator_cases.unmatched(found, expected) <= 0.005


def test_detections_that_are_missing_or_moved_are_counted() -> None:
    anchors = anchors_of(DEMO)
    found = reference.decode_nms(*operator_cases.network_like(anchors, 2, generator()), anchors)
    total = int(found.counts.sum())
    assert operator_cases.unmatched(found, found) == 0
    fewer = found._replace(counts=found.counts - 3)
    assert operator_cases.unmatched(fewer, found) == pytest.approx(6 / (2 * total - 6))
    moved = found._replace(boxes_ltrb=found.boxes_ltrb.index_fill(1, torch.tensor([0]), 5.0))
    assert operator_cases.unmatched(moved, found) == pytest.approx(4 / (2 * total))
    relabelled = found._replace(labels=found.labels + 1)
    assert operator_cases.unmatched(relabelled, found) == 1


def test_a_gradient_that_is_not_a_number_is_a_difference() -> None:
    good, bad = torch.tensor([1.0, 4.0]), torch.tensor([1.0, torch.nan])
    assert operator_cases.loss_difference((good, good), (good, good)) == 0
    assert operator_cases.loss_difference((good, good - 1), (good, good)) == 0.25
    assert not operator_cases.loss_difference((good, bad), (good, good)) <= 1
    assert not operator_cases.loss_difference((bad, good), (good, good)) <= 1
