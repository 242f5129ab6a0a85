"""The compiled target encoding against the plain version, on every device at hand."""

from typing import Any

import pytest
import torch
from box_samples import grid_boxes, random_boxes, seeded
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from operator_samples import (
    BY_CUDA_SOURCES,
    CUDA,
    INF,
    NAN,
    GroundTruths,
    assert_same_bits,
    assert_targets_equal,
    ground_truths,
    looks_at_values,
    pyramid_anchors,
    strided,
)
from torch import Tensor

from kernels import encode_boxes, multibox_loss, reference
from kernels.boxes import cxcywh_to_ltrb, iou_matrix, ltrb_to_cxcywh


def good(device: torch.device) -> dict[str, Any]:
    anchors = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 0.5], [0.5, 0, 1, 1]])
    inputs = {
        "boxes_ltrb": torch.tensor([[0, 0, 1, 1], [0, 0, 0.5, 0.5]]),
        "labels": torch.tensor([1, 2]),
        "offsets": torch.tensor([0, 2]),
        "anchors_cxcywh": ltrb_to_cxcywh(anchors),
    }
    return {name: tensor.to(device) for name, tensor in inputs.items()}


@pytest.mark.parametrize(
    ("num_anchors", "counts"),
    [
        (8_732, [0, 8, 1, 60, 0, 64, 64, 64]),
        (15_130, [8, 0, 63]),
        (100_000, [3, 20]),
        (300, [3_000, 0, 257]),  # more than 2,048 boxes in the call
        (33, [0, 5, 40, 0]),
        (1, [3, 0, 1]),
    ],
)
def test_targets_are_those_of_the_plain_version(device: torch.device, num_anchors: int, counts: list[int]) -> None:
    truths, anchors = ground_truths(counts), pyramid_anchors(num_anchors)
    expected = reference.encode_boxes(*truths, anchors)
    assert_targets_equal(encode_boxes(*truths.to(device), anchors.to(device)), expected)
    ranks = torch.randperm(num_anchors, generator=seeded(1))
    expected = reference.encode_boxes(*truths, anchors, tie_ranks=ranks)
    found = encode_boxes(*truths.to(device), anchors.to(device), tie_ranks=ranks.to(device))
    assert_targets_equal(found, expected)


@settings(deadline=None)
@given(
    images=st.lists(st.lists(grid_boxes, max_size=9), max_size=3),
    anchors=st.lists(grid_boxes, min_size=1, max_size=40),
    iou_threshold=st.sampled_from([0.5, 0.3, 0.25, 0.0, 1.0]),
    shuffler=st.randoms(use_true_random=False),
)
def test_exact_ties_fall_as_in_the_plain_version(
    device: torch.device, images: list[list], anchors: list, iou_threshold: float, shuffler: Any
) -> None:
    boxes = torch.tensor([box for image in images for box in image]).view(-1, 4)
    offsets = torch.tensor([0, *(len(image) for image in images)]).cumsum(0)
    truths = GroundTruths(boxes, torch.arange(1, len(boxes) + 1), offsets)
    anchors_cxcywh = ltrb_to_cxcywh(torch.tensor(anchors))
    ranks = list(range(len(anchors)))
    shuffler.shuffle(ranks)
    for tie_ranks in (None, torch.tensor(ranks), torch.tensor(ranks, dtype=torch.int32)):
        expected = reference.encode_boxes(*truths, anchors_cxcywh, iou_threshold=iou_threshold, tie_ranks=tie_ranks)
        found = encode_boxes(
            *truths.to(device),
            anchors_cxcywh.to(device),
            iou_threshold=iou_threshold,
            tie_ranks=None if tie_ranks is None else tie_ranks.to(device),
        )
        assert_targets_equal(found, expected)


def test_the_last_of_many_ground_truths_gets_the_best_anchor_that_they_share(device: torch.device) -> None:
    boxes = torch.tensor([[0.0, 0.0, 0.5, 1.0]]).repeat(700, 1)
    boxes[:, 2] += torch.arange(700) / 4096
    anchors = ltrb_to_cxcywh(torch.tensor([[2.0, 2.0, 3.0, 3.0], [0.0, 0.0, 1.0, 1.0]]))
    truths = GroundTruths(boxes, torch.arange(1, 701), torch.tensor([0, 700]))
    assert encode_boxes(*truths.to(device), anchors.to(device)).labels.tolist() == [[0, 700]]


def test_a_ground_truth_that_overlaps_no_anchor_takes_the_one_of_lowest_tie_rank(device: torch.device) -> None:
    truths = GroundTruths(torch.tensor([[7.0, 7.0, 8.0, 9.0]]), torch.tensor([5]), torch.tensor([0, 1]))
    anchors = pyramid_anchors(40)
    assert encode_boxes(*truths.to(device), anchors.to(device)).labels[0].nonzero().tolist() == [[0]]
    ranks = torch.arange(40).roll(17).to(device)
    found = encode_boxes(*truths.to(device), anchors.to(device), tie_ranks=ranks)
    assert found.labels[0].nonzero().tolist() == [[17]]


def test_a_ground_truth_that_barely_overlaps_one_anchor_takes_that(device: torch.device) -> None:
    rows, columns = torch.meshgrid(torch.arange(8) + 0.5, torch.arange(8) + 0.5, indexing="ij")
    centres = torch.stack((columns.flatten(), rows.flatten()), dim=-1) / 8
    anchors = torch.cat((centres, torch.full_like(centres, 1 / 16)), dim=-1)  # squares, 1/16 from the next
    reach = 1 / 16 - 1 / 1024  # of two squares that overlap by 1/1024
    shifts = torch.tensor([[-reach, 0, 0, 0], [reach, 0, 0, 0], [0, -reach, 0, 0], [0, reach, 0, 0]])
    boxes = cxcywh_to_ltrb((anchors[:, None] + shifts).flatten(0, 1))  # 4 around each anchor
    truths = GroundTruths(boxes, torch.ones(256, dtype=torch.int32), torch.arange(257))
    labels = encode_boxes(*truths.to(device), anchors.to(device)).labels.cpu()
    assert torch.equal(labels, torch.eye(64, dtype=torch.int32).repeat_interleave(4, dim=0))


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 12))
def test_best_anchors_are_positive_and_all_other_positives_overlap_by_more_than_the_threshold(
    device: torch.device, seed: int, count: int
) -> None:
    boxes, anchors = random_boxes(count, seeded(seed)), pyramid_anchors(500)
    truths = GroundTruths(boxes, torch.arange(1, count + 1), torch.tensor([0, count]))
    labels = encode_boxes(*truths.to(device), anchors.to(device)).labels[0].cpu().long()
    ious = iou_matrix(boxes, cxcywh_to_ltrb(anchors))  # [G, A]
    best = torch.zeros_like(labels, dtype=torch.bool).index_fill(0, ious.argmax(dim=1), True)
    assert labels[best].gt(0).all()
    others = ((labels > 0) & ~best).nonzero().flatten()
    assert ious[labels[others] - 1, others].gt(0.5).all()
    assert labels[ious.max(dim=0).values > 0.5].gt(0).all()


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(2, 10))
def test_the_loss_does_not_depend_on_the_order_of_ground_truths_that_share_no_best_anchor(
    device: torch.device, seed: int, count: int
) -> None:
    generator, anchors = seeded(seed), pyramid_anchors(500)
    truths = ground_truths([count], seed)
    best = iou_matrix(truths.boxes_ltrb, cxcywh_to_ltrb(anchors)).argmax(dim=1)
    assume(best.unique().numel() == count)
    order = torch.randperm(count, generator=generator)
    reordered = GroundTruths(truths.boxes_ltrb[order], truths.labels[order], truths.offsets)
    deltas, logits = (torch.randn(1, 500, size, generator=generator).to(device) for size in (4, 81))
    one, other = (
        multibox_loss(deltas, logits, *encode_boxes(*either.to(device), anchors.to(device)))
        for either in (truths, reordered)
    )
    assert_same_bits(one, other)


def test_storage_and_number_types_of_the_input_do_not_matter(device: torch.device) -> None:
    truths, anchors = ground_truths([3, 0, 5]).to(device), pyramid_anchors(70).to(device)
    ranks = torch.randperm(70, generator=seeded(0)).to(device)
    plain = encode_boxes(*truths, anchors, tie_ranks=ranks)
    odd = GroundTruths(strided(truths.boxes_ltrb), strided(truths.labels.long()), strided(truths.offsets.int()))
    assert_same_bits(encode_boxes(*odd, strided(anchors.double()), tie_ranks=strided(ranks.int())), plain)
    halves = encode_boxes(*truths, anchors.half())
    assert_same_bits(halves, encode_boxes(*truths, anchors.half().float()))


@pytest.mark.parametrize("num_images", [0, 1, 3])
def test_without_boxes_everything_is_background(device: torch.device, num_images: int) -> None:
    found = encode_boxes(*ground_truths([0] * num_images).to(device), pyramid_anchors(50).to(device))
    assert found.deltas.shape == (num_images, 50, 4)
    assert found.labels.shape == (num_images, 50)
    assert found.labels.eq(0).all()
    assert found.deltas.eq(0).all()


bad_values = pytest.mark.parametrize(
    ("name", "value"),
    [
        ("boxes_ltrb", torch.tensor([[0, 0, 1, 1], [0.5, 0, 0.5, 1]])),
        ("boxes_ltrb", torch.tensor([[0, 0, 1, 1], [0, 0.5, 1, 0.25]])),
        ("boxes_ltrb", torch.tensor([[0, 0, 1, 1], [0, 0, 1, INF]])),
        ("boxes_ltrb", torch.tensor([[0, 0, 1, 1], [0, 0, NAN, 1]])),
        ("boxes_ltrb", torch.tensor([[0, 0, 1, 1], [-INF, 0, 1, 1]])),
        ("labels", torch.tensor([1, 0])),
        ("labels", torch.tensor([1, -(2**31)], dtype=torch.int32)),
        ("labels", torch.tensor([1, 1 - 2**32])),
    ],
)


@bad_values
@pytest.mark.skipif(not looks_at_values(torch.device("cpu")), reason="not the build for CPUs")
def test_on_the_cpu_a_ground_truth_without_area_or_class_is_an_error(name: str, value: Tensor) -> None:
    with pytest.raises(ValueError, match=f"^{name}"):
        encode_boxes(**{**good(torch.device("cpu")), name: value})


@bad_values
@BY_CUDA_SOURCES
def test_on_a_gpu_a_ground_truth_without_area_or_class_is_left_out(
    device: torch.device, name: str, value: Tensor
) -> None:
    inputs = good(torch.device("cpu")) | {name: value}
    alone = {**inputs, "offsets": torch.tensor([0, 1])}
    alone |= {key: inputs[key][:1] for key in ("boxes_ltrb", "labels")}
    found = encode_boxes(**{key: tensor.to(device) for key, tensor in inputs.items()})
    assert_targets_equal(found, reference.encode_boxes(**alone))


@pytest.mark.parametrize("offsets", [[0, 1], [1, 2], [0, 2, 1, 2], [0, 3], [-1, 2], [0, 2**62, 2], [-(2**63), 2]])
def test_offsets_that_do_not_partition_the_boxes_touch_no_other_memory(
    device: torch.device, offsets: list[int]
) -> None:
    inputs = {**good(device), "offsets": torch.tensor(offsets, device=device)}
    if looks_at_values(device):
        with pytest.raises(ValueError, match=r"^offsets"):
            encode_boxes(**inputs)
    else:
        assert encode_boxes(**inputs).labels.shape == (len(offsets) - 1, 3)
        if CUDA:
            torch.cuda.synchronize()


@pytest.mark.parametrize("ranks", [[0, 0, 0], [3, 4, 5], [-1, -2, -3], [2**40, 0, 1], [-(2**63), 2**63 - 1, 0]])
def test_tie_ranks_that_are_no_permutation_touch_no_other_memory(device: torch.device, ranks: list[int]) -> None:
    inputs = {**good(device), "tie_ranks": torch.tensor(ranks, device=device)}
    if looks_at_values(device):
        with pytest.raises(ValueError, match=r"^tie_ranks"):
            encode_boxes(**inputs)
    else:
        assert encode_boxes(**inputs).labels.ge(0).all()


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("boxes_ltrb", torch.ones(2, 5), r"has shape \[2, 5\]: expected \[any, 4\]"),
        ("boxes_ltrb", torch.ones(8), r"has shape \[8\]: expected \[any, 4\]"),
        ("boxes_ltrb", torch.ones(2, 4).half(), "is torch.float16: expected float32"),
        ("boxes_ltrb", torch.ones(2, 4).double(), "is torch.float64: expected float32"),
        ("labels", torch.tensor([1.0, 2.0]), "is torch.float32: expected int32 or int64"),
        ("labels", torch.tensor([1]), r"has shape \[1\]: expected \[2\]"),
        ("offsets", torch.tensor([0.0, 2.0]), "is torch.float32: expected int32 or int64"),
        ("offsets", torch.tensor(2), r"has shape \[\]: expected \[any\]"),
        ("offsets", torch.zeros(0, dtype=torch.int64), r"has shape \[0\]"),
        ("anchors_cxcywh", torch.ones(3), r"has shape \[3\]: expected \[any, 4\]"),
        ("anchors_cxcywh", torch.ones(3, 4, dtype=torch.int32), "is torch.int32: expected float16, bfloat16"),
        ("anchors_cxcywh", torch.ones(0, 4), "has 0 rows"),
        ("tie_ranks", torch.tensor([0, 1]), r"has shape \[2\]: expected \[3\]"),
        ("tie_ranks", torch.ones(3), "is torch.float32: expected int32 or int64"),
        ("iou_threshold", 1.5, "= 1.5: expected 0 to 1"),
        ("iou_threshold", NAN, "= nan: expected 0 to 1"),
    ],
)
def test_bad_input_is_named(device: torch.device, name: str, value: Any, complaint: str) -> None:
    value = value.to(device) if isinstance(value, Tensor) else value
    with pytest.raises(ValueError, match=f"^{name} {complaint}"):
        encode_boxes(**{**good(device), name: value})
