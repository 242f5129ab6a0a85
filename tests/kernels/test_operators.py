"""The compiled operators against their plain versions, on every device at hand.

kernels.reference states the rules and test_reference_operators.py tests that it keeps them. Here the compiled operators
are compared with it and led to where plain torch has nothing to fear: sizes, memory, threads, compilers. Needs torch,
pytest and hypothesis alone, so that it runs on a bare machine with a GPU.
"""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import Detections, cuda_build, decode_nms, encode_boxes, multibox_loss, reference

CUDA = torch.cuda.is_available() and not cuda_build().startswith("CUDA not built")
DEVICES = ["cpu", "cuda"] if CUDA else ["cpu"]
FLOATS = [torch.float16, torch.bfloat16, torch.float32]
ON_A_GPU = pytest.mark.parametrize(
    "device",
    [pytest.param(torch.device("cuda"), id="cuda", marks=pytest.mark.skipif(not CUDA, reason="no GPU, or no kernels"))],
)
NAN, INF = math.nan, math.inf
# grid size and anchors per cell of every level, by number of anchors
PYRAMIDS = {
    8_732: [(38, 4), (19, 6), (10, 6), (5, 6), (3, 4), (1, 4)],
    15_130: [(50, 4), (25, 6), (13, 6), (7, 6), (3, 4), (3, 4)],
}


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def set_num_threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads of this test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_boxes(count: int, generator: torch.Generator) -> Tensor:
    """[count, 4] corners in the unit square, sides 0.04 to 0.64."""
    sides = 0.04 + 0.6 * torch.rand(count, 2, generator=generator)
    corners = torch.rand(count, 2, generator=generator) * (1 - sides)
    return torch.cat((corners, corners + sides), dim=1)


def pyramid_anchors(num_anchors: int) -> Tensor:
    """[A, 4] cxcywh laid out like the network's; random ones where no network has that many."""
    if num_anchors not in PYRAMIDS:
        return reference.ltrb_to_cxcywh(random_boxes(num_anchors, seeded(num_anchors)))
    levels = []
    for level, (grid_size, num_shapes) in enumerate(PYRAMIDS[num_anchors]):
        centres = (torch.arange(grid_size) + 0.5) / grid_size
        stretch = 1.5 ** (torch.arange(num_shapes) - num_shapes // 2)
        sizes = (0.07 + 0.17 * level) * torch.stack((stretch.sqrt(), 1 / stretch.sqrt()), dim=-1)  # [shapes, 2]
        rows, columns, shapes = torch.meshgrid(centres, centres, torch.arange(float(num_shapes)), indexing="ij")
        levels.append(torch.cat((columns[..., None], rows[..., None], sizes[shapes.long()]), dim=-1).flatten(0, 2))
    return torch.cat(levels).clamp(0, 1)


def strided(tensor: Tensor) -> Tensor:
    """The same values in permuted, spaced storage."""
    spaced = tensor.movedim(-1, 0).repeat_interleave(2, dim=0)[::2].movedim(0, -1)
    assert tensor.numel() < 2 or not spaced.is_contiguous()
    return spaced


def assert_same_bits(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for tensor, other in zip(found, expected, strict=True):
        torch.testing.assert_close(tensor.cpu(), other.cpu(), rtol=0, atol=0, equal_nan=True)


class GroundTruths(NamedTuple):
    boxes_ltrb: Tensor
    labels: Tensor
    offsets: Tensor

    def to(self, device: torch.device) -> "GroundTruths":
        return GroundTruths(*(tensor.to(device) for tensor in self))


def ground_truths(counts: list[int], seed: int = 0) -> GroundTruths:
    """As many random boxes for every image, labelled 1 to 80."""
    generator = seeded(seed)
    labels = torch.randint(1, 81, (sum(counts),), generator=generator, dtype=torch.int32)
    return GroundTruths(random_boxes(sum(counts), generator), labels, torch.tensor([0, *counts]).cumsum(0))


def assert_targets_equal(found: reference.Targets, expected: reference.Targets) -> None:
    assert found.labels.dtype == torch.int32
    assert torch.equal(found.labels.cpu(), expected.labels)
    torch.testing.assert_close(found.deltas.cpu(), expected.deltas, rtol=2e-6, atol=2e-6)
    assert found.deltas.cpu()[expected.labels == 0].eq(0).all()


# corners on a coarse grid of binary fractions: many exact ties, and IoUs that are exactly the threshold
grid_boxes = st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(1, 4), st.integers(1, 4)).map(
    lambda box: (box[0] / 8, box[1] / 8, (box[0] + box[2]) / 8, (box[1] + box[3]) / 8)
)


class TestEncodeBoxes:
    @pytest.mark.parametrize(
        ("num_anchors", "counts"),
        [
            (8_732, [0, 8, 1, 60, 0, *[64] * 34]),  # more than 2,048 boxes in the call
            (15_130, [8, 0, 63]),
            (100_000, [3, 20]),
            (300, [3_000, 0, 257]),
            (33, [0, 5, 40, 0]),
            (1, [3, 0, 1]),
        ],
    )
    def test_targets_are_those_of_the_plain_version(
        self, device: torch.device, num_anchors: int, counts: list[int]
    ) -> None:
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
        self, device: torch.device, images: list[list], anchors: list, iou_threshold: float, shuffler: Any
    ) -> None:
        boxes = torch.tensor([box for image in images for box in image]).view(-1, 4)
        offsets = torch.tensor([0, *(len(image) for image in images)]).cumsum(0)
        truths = GroundTruths(boxes, torch.arange(1, len(boxes) + 1), offsets)
        anchors_cxcywh = reference.ltrb_to_cxcywh(torch.tensor(anchors))
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

    def test_the_last_of_many_ground_truths_gets_the_best_anchor_that_they_share(self, device: torch.device) -> None:
        boxes = torch.tensor([[0.0, 0.0, 0.5, 1.0]]).repeat(700, 1)
        boxes[:, 2] += torch.arange(700) / 4096
        anchors = reference.ltrb_to_cxcywh(torch.tensor([[2.0, 2.0, 3.0, 3.0], [0.0, 0.0, 1.0, 1.0]]))
        truths = GroundTruths(boxes, torch.arange(1, 701), torch.tensor([0, 700]))
        assert encode_boxes(*truths.to(device), anchors.to(device)).labels.tolist() == [[0, 700]]

    def test_a_ground_truth_that_overlaps_no_anchor_takes_the_one_of_lowest_tie_rank(
        self, device: torch.device
    ) -> None:
        truths = GroundTruths(torch.tensor([[7.0, 7.0, 8.0, 9.0]]), torch.tensor([5]), torch.tensor([0, 1]))
        anchors = pyramid_anchors(40)
        assert encode_boxes(*truths.to(device), anchors.to(device)).labels[0].nonzero().tolist() == [[0]]
        ranks = torch.arange(40).roll(17).to(device)
        found = encode_boxes(*truths.to(device), anchors.to(device), tie_ranks=ranks)
        assert found.labels[0].nonzero().tolist() == [[17]]

    def test_a_ground_truth_that_barely_overlaps_one_anchor_takes_that(self, device: torch.device) -> None:
        rows, columns = torch.meshgrid(torch.arange(8) + 0.5, torch.arange(8) + 0.5, indexing="ij")
        centres = torch.stack((columns.flatten(), rows.flatten()), dim=-1) / 8
        anchors = torch.cat((centres, torch.full_like(centres, 1 / 16)), dim=-1)  # squares, 1/16 from the next
        reach = 1 / 16 - 1 / 1024  # of two squares that overlap by 1/1024
        shifts = torch.tensor([[-reach, 0, 0, 0], [reach, 0, 0, 0], [0, -reach, 0, 0], [0, reach, 0, 0]])
        boxes = reference.cxcywh_to_ltrb((anchors[:, None] + shifts).flatten(0, 1))  # 4 around each anchor
        truths = GroundTruths(boxes, torch.ones(256, dtype=torch.int32), torch.arange(257))
        labels = encode_boxes(*truths.to(device), anchors.to(device)).labels.cpu()
        assert torch.equal(labels, torch.eye(64, dtype=torch.int32).repeat_interleave(4, dim=0))

    @settings(deadline=None)
    @given(seed=st.integers(0, 10**6), count=st.integers(1, 12))
    def test_best_anchors_are_positive_and_all_other_positives_overlap_by_more_than_the_threshold(
        self, device: torch.device, seed: int, count: int
    ) -> None:
        boxes, anchors = random_boxes(count, seeded(seed)), pyramid_anchors(500)
        truths = GroundTruths(boxes, torch.arange(1, count + 1), torch.tensor([0, count]))
        labels = encode_boxes(*truths.to(device), anchors.to(device)).labels[0].cpu().long()
        ious = reference.iou_matrix(boxes, reference.cxcywh_to_ltrb(anchors))  # [G, A]
        best = torch.zeros_like(labels, dtype=torch.bool).index_fill(0, ious.argmax(dim=1), True)
        assert labels[best].gt(0).all()
        others = ((labels > 0) & ~best).nonzero().flatten()
        assert ious[labels[others] - 1, others].gt(0.5).all()
        assert labels[ious.max(dim=0).values > 0.5].gt(0).all()

    @settings(deadline=None)
    @given(seed=st.integers(0, 10**6), count=st.integers(2, 10))
    def test_the_loss_does_not_depend_on_the_order_of_ground_truths_that_share_no_best_anchor(
        self, device: torch.device, seed: int, count: int
    ) -> None:
        generator, anchors = seeded(seed), pyramid_anchors(500)
        truths = ground_truths([count], seed)
        best = reference.iou_matrix(truths.boxes_ltrb, reference.cxcywh_to_ltrb(anchors)).argmax(dim=1)
        assume(best.unique().numel() == count)
        order = torch.randperm(count, generator=generator)
        reordered = GroundTruths(truths.boxes_ltrb[order], truths.labels[order], truths.offsets)
        predictions = [torch.randn(1, 500, size, generator=generator).to(device) for size in (4, 81)]
        one, other = (
            multibox_loss(*predictions, *encode_boxes(*either.to(device), anchors.to(device)))
            for either in (truths, reordered)
        )
        assert_same_bits(one, other)

    def test_storage_and_number_types_of_the_input_do_not_matter(self, device: torch.device) -> None:
        truths, anchors = ground_truths([3, 0, 5]).to(device), pyramid_anchors(70).to(device)
        ranks = torch.randperm(70, generator=seeded(0)).to(device)
        plain = encode_boxes(*truths, anchors, tie_ranks=ranks)
        odd = GroundTruths(strided(truths.boxes_ltrb), strided(truths.labels.long()), strided(truths.offsets.int()))
        assert_same_bits(encode_boxes(*odd, strided(anchors.double()), tie_ranks=strided(ranks.int())), plain)
        halves = encode_boxes(*truths, anchors.half())
        assert_same_bits(halves, encode_boxes(*truths, anchors.half().float()))

    @pytest.mark.parametrize("num_images", [0, 1, 3])
    def test_without_boxes_everything_is_background(self, device: torch.device, num_images: int) -> None:
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
        ],
    )

    @bad_values
    def test_on_the_cpu_a_ground_truth_without_area_or_class_is_an_error(self, name: str, value: Tensor) -> None:
        with pytest.raises(ValueError, match=f"^{name}"):
            encode_boxes(**{**self.good(torch.device("cpu")), name: value})

    @bad_values
    @ON_A_GPU
    def test_on_a_gpu_a_ground_truth_without_area_or_class_is_left_out(
        self, device: torch.device, name: str, value: Tensor
    ) -> None:
        inputs = self.good(torch.device("cpu")) | {name: value}
        alone = {**inputs, "offsets": torch.tensor([0, 1])}
        alone |= {key: inputs[key][:1] for key in ("boxes_ltrb", "labels")}
        found = encode_boxes(**{key: tensor.to(device) for key, tensor in inputs.items()})
        assert_targets_equal(found, reference.encode_boxes(**alone))

    @pytest.mark.parametrize("offsets", [[0, 1], [1, 2], [0, 2, 1, 2], [0, 3], [-1, 2], [0, 2**62, 2], [-(2**63), 2]])
    def test_offsets_that_do_not_partition_the_boxes_touch_no_other_memory(
        self, device: torch.device, offsets: list[int]
    ) -> None:
        inputs = {**self.good(device), "offsets": torch.tensor(offsets, device=device)}
        if device.type == "cpu":
            with pytest.raises(ValueError, match=r"^offsets"):
                encode_boxes(**inputs)
        else:
            assert encode_boxes(**inputs).labels.shape == (len(offsets) - 1, 3)
            torch.cuda.synchronize()

    @pytest.mark.parametrize("ranks", [[0, 0, 0], [3, 4, 5], [-1, -2, -3], [2**40, 0, 1], [-(2**63), 2**63 - 1, 0]])
    def test_tie_ranks_that_are_no_permutation_touch_no_other_memory(
        self, device: torch.device, ranks: list[int]
    ) -> None:
        inputs = {**self.good(device), "tie_ranks": torch.tensor(ranks, device=device)}
        if device.type == "cpu":
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
    def test_bad_input_is_named(self, device: torch.device, name: str, value: Any, complaint: str) -> None:
        value = value.to(device) if isinstance(value, Tensor) else value
        with pytest.raises(ValueError, match=f"^{name} {complaint}"):
            encode_boxes(**{**self.good(device), name: value})

    @staticmethod
    def good(device: torch.device) -> dict[str, Tensor]:
        anchors = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 0.5], [0.5, 0, 1, 1]])
        inputs = {
            "boxes_ltrb": torch.tensor([[0, 0, 1, 1], [0, 0, 0.5, 0.5]]),
            "labels": torch.tensor([1, 2]),
            "offsets": torch.tensor([0, 2]),
            "anchors_cxcywh": reference.ltrb_to_cxcywh(anchors),
        }
        return {name: tensor.to(device) for name, tensor in inputs.items()}


class LossInput(NamedTuple):
    deltas: Tensor
    logits: Tensor
    target_deltas: Tensor
    target_labels: Tensor

    def to(self, device: torch.device) -> "LossInput":
        return LossInput(*(tensor.to(device) for tensor in self))


class LossResult(NamedTuple):
    box: Tensor
    class_: Tensor
    grad_deltas: Tensor
    grad_logits: Tensor


def loss_input(
    batch_size: int,
    num_anchors: int,
    num_classes: int,
    dtype: torch.dtype = torch.float32,
    *,
    positive_share: float = 0.02,
    seed: int = 0,
) -> LossInput:
    generator = seeded(seed)
    deltas, target_deltas = torch.randn(2, batch_size, num_anchors, 4, generator=generator) * 1.5
    logits = torch.randn(batch_size, num_anchors, num_classes, generator=generator) * 2
    logits[..., 0] += 3
    labels = torch.randint(1, num_classes, (batch_size, num_anchors), generator=generator, dtype=torch.int32)
    background = torch.rand(batch_size, num_anchors, generator=generator) >= positive_share
    return LossInput(deltas.to(dtype), logits.to(dtype), target_deltas, labels.masked_fill(background, 0))


def loss_of_labels(labels: list[list[int]], num_classes: int = 4, dtype: torch.dtype = torch.float32) -> LossInput:
    target_labels = torch.tensor(labels, dtype=torch.int32)
    return loss_input(*target_labels.shape, num_classes, dtype)._replace(target_labels=target_labels)


def run_loss(operator: Callable, values: LossInput, grad_box: Tensor, grad_class: Tensor) -> LossResult:
    deltas, logits = (x.detach().requires_grad_() for x in values[:2])
    parts = operator(deltas, logits, *values[2:])
    grads = [grad.to(parts.box) for grad in (grad_box, grad_class)]
    return LossResult(*(x.detach() for x in parts), *torch.autograd.grad(parts, (deltas, logits), grads))


def assert_loss_equals_plain(
    device: torch.device, values: LossInput, grad_box: Tensor | None = None, grad_class: Tensor | None = None
) -> LossResult:
    """Losses and gradients against those of the plain version in float64; infinities and NaNs must be the same."""
    batch_size, dtype = values.deltas.shape[0], values.deltas.dtype
    default = torch.rand(2, batch_size, generator=seeded(9)) + 0.5
    grads = (default[0] if grad_box is None else grad_box, default[1] if grad_class is None else grad_class)
    wide = LossInput(*(x.double() if x.is_floating_point() else x for x in values))
    expected = run_loss(reference.multibox_loss, wide, *grads)
    # what does not count has no gradient; where it is not finite, plain torch makes 0 x NaN of it
    expected.grad_deltas[values.target_labels <= 0] = 0
    expected.grad_logits[~values.target_labels.any(dim=1)] = 0
    found = LossResult(*(x.cpu() for x in run_loss(multibox_loss, values.to(device), *grads)))
    loss_tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    rtol, atol = {
        torch.float64: (1e-10, 1e-13),
        torch.float32: (1e-4, 1e-6),
        torch.float16: (2e-3, 1e-6),
        torch.bfloat16: (8e-3, 1e-6),
    }[dtype]
    for part, want in zip(found[:2], expected[:2], strict=True):
        assert part.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(part.double(), want, rtol=loss_tolerance, atol=loss_tolerance, equal_nan=True)
    for grad, want in zip(found[2:], expected[2:], strict=True):
        assert grad.dtype == dtype
        torch.testing.assert_close(grad.double(), want, rtol=rtol, atol=atol, equal_nan=True)
        assert grad[want == 0].eq(0).all()
    return found


class TestMultiboxLoss:
    @pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
    @pytest.mark.parametrize(
        "sizes",
        [(2, 8_732, 81), (1, 15_130, 81), (1, 100_000, 3), (2, 130, 1_000), (3, 37, 5), (2, 1, 2), (1, 257, 91)],
        ids=str,
    )
    def test_losses_and_gradients_are_those_of_the_plain_version(
        self, device: torch.device, sizes: tuple[int, int, int], dtype: torch.dtype
    ) -> None:
        found = assert_loss_equals_plain(device, loss_input(*sizes, dtype, positive_share=0.02 + 2 / sizes[1]))
        assert sizes[1] == 1 or (found.box > 0).all()

    def test_gradients_are_those_of_finite_differences(self, device: torch.device) -> None:
        values = loss_of_labels([[1, 0, 0, 3, 0, 0, 0, 0, 0, 0], [0, 2, *[0] * 8], [0] * 10], dtype=torch.float64)
        deltas, logits, *targets = values.to(device)
        assert torch.autograd.gradcheck(
            lambda *predictions: tuple(multibox_loss(*predictions, *targets)),
            (deltas.requires_grad_(), logits.requires_grad_()),
        )

    @pytest.mark.parametrize("part", ["box", "class_"])
    def test_each_part_has_the_gradient_of_its_own_prediction_alone(self, device: torch.device, part: str) -> None:
        values = loss_input(2, 50, 4, positive_share=0.2).to(device)
        deltas, logits = (x.clone().requires_grad_() for x in values[:2])
        getattr(multibox_loss(deltas, logits, *values[2:]), part).sum().backward()
        grads = {"box": deltas.grad, "class_": logits.grad}
        assert grads.pop(part).any()
        (other,) = grads.values()
        assert other is None or not other.any()

    def test_a_frozen_prediction_gets_no_gradient_and_leaves_the_other_as_it_is(self, device: torch.device) -> None:
        values = loss_input(2, 50, 4, positive_share=0.2).to(device)
        both = run_loss(multibox_loss, values, *torch.ones(2, 2))
        logits = values.logits.clone().requires_grad_()
        sum(part.sum() for part in multibox_loss(values.deltas, logits, *values[2:])).backward()
        assert torch.equal(logits.grad, both.grad_logits)

    def test_a_second_derivative_is_an_error(self, device: torch.device) -> None:
        values = loss_input(1, 20, 3, torch.float64, positive_share=0.3).to(device)
        logits = values.logits.clone().requires_grad_()
        loss = multibox_loss(values.deltas, logits, *values[2:]).class_.sum()
        (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
        with pytest.raises(RuntimeError):
            torch.autograd.grad(grad.square().sum(), logits)

    def test_an_image_without_positives_has_no_loss_and_no_gradient(self, device: torch.device) -> None:
        found = assert_loss_equals_plain(device, loss_of_labels([[0] * 8, [0, 2, 0, 0, 0, 0, 0, 0]]))
        for result in found:
            assert result[0].eq(0).all()
            assert result[1].ne(0).any()

    @pytest.mark.parametrize("positive_share", [0.4, 0.9, 1.0])
    def test_where_negatives_run_out_every_anchor_counts_once(
        self, device: torch.device, positive_share: float
    ) -> None:
        found = assert_loss_equals_plain(device, loss_input(3, 200, 6, positive_share=positive_share))
        assert found.grad_logits.ne(0).any(dim=-1).all()

    @pytest.mark.parametrize("num_anchors", [9, 8_732])
    @pytest.mark.parametrize("levels", [1, 3])
    def test_equally_hard_negatives_are_taken_in_the_order_of_their_index(
        self, device: torch.device, num_anchors: int, levels: int
    ) -> None:
        deltas, _, target_deltas, labels = loss_input(2, num_anchors, 2)
        labels[:, num_anchors // 2] = 1
        hardness = torch.randint(0, levels, labels.shape, generator=seeded(2)).float()
        logits = torch.stack((torch.zeros_like(hardness), hardness), dim=-1)
        assert_loss_equals_plain(device, LossInput(deltas, logits, target_deltas, labels))

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    def test_huge_logits_overflow_nowhere(self, device: torch.device, dtype: torch.dtype) -> None:
        deltas, logits, *targets = loss_input(2, 60, 7, dtype, positive_share=0.1)
        found = assert_loss_equals_plain(device, LossInput(deltas, (logits * 5_000).clamp(-6e4, 6e4), *targets))
        assert all(result.isfinite().all() for result in found)

    @pytest.mark.parametrize("value", [NAN, INF, -INF])
    @pytest.mark.parametrize("place", ["positive", "background"])
    @pytest.mark.parametrize("name", ["deltas", "logits"])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
    def test_what_is_not_finite_reaches_loss_and_gradient_as_in_the_plain_version(
        self, device: torch.device, name: str, place: str, value: float, dtype: torch.dtype
    ) -> None:
        values = loss_of_labels([[0, 2, 0, 0, 0, 0, 0, 0, 0, 0], [0] * 10, [1] + [0] * 9], dtype=dtype)
        tensor, anchor = getattr(values, name), 1 if place == "positive" else 5
        tensor[:2, anchor, 2] = value
        found = assert_loss_equals_plain(device, values)
        assert all(result[1].eq(0).all() for result in found)  # no positives: nothing counts
        assert all(result[2].isfinite().all() for result in found)

    @pytest.mark.parametrize("value", [NAN, INF])
    def test_an_upstream_gradient_that_is_not_finite_reaches_every_row_that_counts(
        self, device: torch.device, value: float
    ) -> None:
        values = loss_input(3, 70, 5, positive_share=0.05, seed=3)
        upstream = torch.tensor([value, 1.0, 1.0])
        for grad_box, grad_class in ((upstream, None), (None, upstream), (upstream, upstream)):
            found = assert_loss_equals_plain(device, values, grad_box, grad_class)
            grads = [found.grad_deltas] * (grad_box is not None) + [found.grad_logits] * (grad_class is not None)
            assert not any(grad[0].isfinite().all() for grad in grads)

    @pytest.mark.parametrize("label", [-1, 4, 5, 2**31 - 1, -(2**31)])
    @pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
    def test_a_label_out_of_range_makes_the_loss_of_its_image_nan(
        self, device: torch.device, label: int, dtype: torch.dtype
    ) -> None:
        good = loss_of_labels([[0, 2, 0, 0, 0, 0, 0], [1, 0, 0, 0, 3, 0, 0]])
        labels = good.target_labels.to(dtype)
        labels[0, 3] = label
        bad = good._replace(target_labels=labels)
        found, expected = (run_loss(multibox_loss, x.to(device), *torch.ones(2, 2)) for x in (bad, good))
        assert found.class_[0].isnan()
        assert_same_bits(*(tuple(part[1] for part in result) for result in (found, expected)))

    @pytest.mark.parametrize("targets", [*FLOATS, torch.float64], ids=str)
    @pytest.mark.parametrize("labels", [torch.int32, torch.int64], ids=str)
    def test_targets_of_any_number_type_will_do(
        self, device: torch.device, targets: torch.dtype, labels: torch.dtype
    ) -> None:
        deltas, logits, target_deltas, target_labels = loss_input(2, 60, 5, torch.float16, positive_share=0.1)
        rounded = target_deltas.to(targets)
        found = assert_loss_equals_plain(device, LossInput(deltas, logits, rounded, target_labels.to(labels)))
        plain = LossInput(deltas, logits, rounded.float(), target_labels).to(device)
        assert_same_bits(found, run_loss(multibox_loss, plain, *torch.rand(2, 2, generator=seeded(9)) + 0.5))

    def test_predictions_of_two_types_are_computed_in_the_wider(self, device: torch.device) -> None:
        deltas, logits, *targets = loss_input(2, 60, 5, torch.float16, positive_share=0.1).to(device)
        for mixed in ((deltas.float(), logits), (deltas, logits.float())):
            assert_same_bits(multibox_loss(*mixed, *targets), multibox_loss(deltas.float(), logits.float(), *targets))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
    def test_storage_of_the_input_does_not_matter(self, device: torch.device, dtype: torch.dtype) -> None:
        values = loss_input(3, 61, 7, dtype, positive_share=0.1).to(device)
        ones = torch.ones(2, 3)
        plain = run_loss(multibox_loss, values, *ones)
        assert_same_bits(run_loss(multibox_loss, LossInput(*(strided(x) for x in values)), *ones), plain)
        # what a head that shares its storage with its neighbour gives: rows that start at any element
        wide = torch.cat((values.deltas, values.logits), dim=-1)
        views = LossInput(wide[..., :4], wide[..., 4:], *values[2:])
        assert_same_bits(run_loss(multibox_loss, views, *ones), plain)
        shifted = [torch.cat((x.new_zeros(1), x.flatten()))[1:].view_as(x) for x in values]
        assert_same_bits(run_loss(multibox_loss, LossInput(*shifted), *ones), plain)
        # an upstream gradient of one number, as .mean().backward() makes it
        expanded = run_loss(multibox_loss, values, *(x.expand(3) for x in torch.ones(2, 1)))
        assert_same_bits(expanded, plain)

    @pytest.mark.parametrize(("batch_size", "num_anchors"), [(0, 5), (2, 0), (0, 0)])
    def test_empty_input_has_no_loss(self, device: torch.device, batch_size: int, num_anchors: int) -> None:
        values = loss_input(batch_size, num_anchors, 3).to(device)
        found = run_loss(multibox_loss, values, *torch.ones(2, batch_size))
        assert found.box.tolist() == found.class_.tolist() == [0] * batch_size
        assert found.grad_logits.shape == values.logits.shape

    bad_input = pytest.mark.parametrize(
        ("name", "value", "complaint"),
        [
            ("deltas", torch.zeros(2, 5, 3), r"has shape \[2, 5, 3\]: expected \[any, any, 4\]"),
            ("deltas", torch.zeros(2, 5, 4, dtype=torch.int32), "is torch.int32: expected float16, bfloat16"),
            ("deltas", torch.zeros(2, 5, 4, dtype=torch.complex64), "is torch.complex64: expected float16, bfloat16"),
            ("logits", torch.zeros(2, 6, 3), r"has shape \[2, 6, 3\]: expected \[2, 5, any\]"),
            ("logits", torch.zeros(2, 5, 1), r"has shape \[2, 5, 1\]: expected at least 2 classes"),
            ("logits", torch.zeros(2, 5, 3, dtype=torch.int64), "is torch.int64: expected float16, bfloat16"),
            ("target_deltas", torch.zeros(2, 4, 5), r"has shape \[2, 4, 5\]: expected \[2, 5, 4\]"),
            ("target_deltas", torch.zeros(2, 5, 4, dtype=torch.int64), "is torch.int64: expected float16, bfloat16"),
            ("target_labels", torch.zeros(2, 5), "is torch.float32: expected int32 or int64"),
            ("target_labels", torch.zeros(2, 5, 1, dtype=torch.int32), r"has shape \[2, 5, 1\]: expected \[2, 5\]"),
            ("target_labels", torch.zeros(2, 5, dtype=torch.bool), "is torch.bool: expected int32 or int64"),
        ],
    )

    @bad_input
    def test_bad_input_is_named(self, device: torch.device, name: str, value: Tensor, complaint: str) -> None:
        inputs = loss_input(2, 5, 3)._asdict() | {name: value}
        with pytest.raises(ValueError, match=f"^{name} {complaint}"):
            multibox_loss(**{key: tensor.to(device) for key, tensor in inputs.items()})

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("grad_box", torch.zeros(3)),
            ("grad_box", torch.zeros(2).double()),
            ("grad_class", torch.zeros(2, 1)),
            ("grad_class", torch.zeros(2).half()),
            ("logits", torch.zeros(2, 5, 3).double()),
            ("logits", torch.zeros(2, 4, 3)),
            ("target_labels", torch.zeros(2, 4, dtype=torch.int32)),
            ("log_normalisers", torch.zeros(2, 4)),
            ("log_normalisers", torch.zeros(2, 5).half()),
            ("num_positives", torch.zeros(1, dtype=torch.int32)),
            ("num_positives", torch.zeros(2, dtype=torch.int64)),
        ],
    )
    def test_bad_input_of_the_backward_pass_is_named(self, device: torch.device, name: str, value: Tensor) -> None:
        values = loss_input(2, 5, 3)._asdict()
        inputs = {"grad_box": torch.zeros(2), "grad_class": torch.zeros(2), **values}
        inputs |= {"log_normalisers": torch.zeros(2, 5), "num_positives": torch.ones(2, dtype=torch.int32)}
        inputs[name] = value
        with pytest.raises(ValueError, match=f"^{name} (has|is) .*: expected "):
            torch.ops.ssd_fast.multibox_loss_backward(*(tensor.to(device) for tensor in inputs.values()))


class DecodeInput(NamedTuple):
    deltas: Tensor
    logits: Tensor
    anchors_cxcywh: Tensor

    def to(self, device: torch.device) -> "DecodeInput":
        return DecodeInput(*(tensor.to(device) for tensor in self))


def decode_input(
    batch_size: int, num_anchors: int, num_classes: int, dtype: torch.dtype = torch.float32, *, seed: int = 0
) -> DecodeInput:
    """Predictions like a network's: sure of the background but for the anchors around a few objects."""
    generator, anchors = seeded(seed), pyramid_anchors(num_anchors)
    deltas = torch.randn(batch_size, num_anchors, 4, generator=generator) * 0.5
    logits = torch.randn(batch_size, num_anchors, num_classes, generator=generator)
    logits[..., 0] += 7
    for image in range(batch_size):
        objects = random_boxes(12, generator)
        classes = torch.randint(1, num_classes, (12,), generator=generator)
        ious, owners = reference.iou_matrix(objects, reference.cxcywh_to_ltrb(anchors)).max(dim=0)
        near = (ious > 0.4).nonzero().flatten()
        logits[image, near, classes[owners[near]]] += 12 * ious[near]
    return DecodeInput(deltas.to(dtype), logits.to(dtype), anchors)


def random_predictions(batch_size: int, num_anchors: int, num_classes: int, seed: int = 0) -> DecodeInput:
    """Predictions like an untrained network's: every class likely everywhere."""
    generator = seeded(seed)
    deltas, logits = (torch.randn(batch_size, num_anchors, size, generator=generator) for size in (4, num_classes))
    return DecodeInput(deltas, logits, pyramid_anchors(num_anchors))


def widened(values: DecodeInput) -> DecodeInput:
    return DecodeInput(*(tensor.double() for tensor in values))


def assert_detections_close(found: Detections, expected: Detections) -> None:
    """Same detections to float32 rounding; among scores that rounding makes equal the order is free."""
    found = Detections(*(tensor.cpu() for tensor in found))
    assert found.counts.dtype == found.labels.dtype == torch.int32
    assert found.boxes_ltrb.dtype == found.scores.dtype == torch.float32
    assert torch.equal(found.counts, expected.counts)
    torch.testing.assert_close(found.scores.double(), expected.scores.double(), rtol=1e-5, atol=1e-7)
    for image, count in enumerate(found.counts.tolist()):
        rows, wanted = (
            torch.cat((d.boxes_ltrb[image], d.scores[image, :, None], d.labels[image, :, None]), dim=-1).double()
            for d in (found, expected)
        )
        assert rows[count:].eq(0).all()
        tolerance = 1e-5 * torch.tensor([1, 1, 1, 1, 1, 0]) * (1 + wanted[:count].abs())  # class exact
        alike = ((rows[:count, None] - wanted[:count]).abs() <= tolerance).all(dim=-1)  # [count, count]
        assert alike.any(dim=0).all()
        assert alike.any(dim=1).all()


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
            assert reference.iou_matrix(boxes, boxes).triu(1).lt(max(iou_threshold, 1e-12)).all()


class TestDecodeNms:
    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    @pytest.mark.parametrize(
        "sizes",
        [(3, 8_732, 81), (2, 15_130, 81), (1, 100_000, 3), (1, 700, 1_000), (3, 37, 5), (2, 1, 2), (1, 257, 91)],
        ids=str,
    )
    def test_detections_are_those_of_the_plain_version(
        self, device: torch.device, sizes: tuple[int, int, int], dtype: torch.dtype
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
        self,
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
        options = {"score_threshold": score_threshold, "iou_threshold": iou_threshold, **limits}
        anchors = reference.ltrb_to_cxcywh(torch.tensor(boxes))
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
        self,
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
    def test_every_anchor_in_every_class(
        self, device: torch.device, limits: tuple[int, int], score_threshold: float
    ) -> None:
        options = {"score_threshold": score_threshold, "max_per_class": limits[0], "max_detections": limits[1]}
        values = random_predictions(1, 600, 9)
        found = decode_nms(*values.to(device), **options)
        assert found.counts.gt(0).all()
        assert_detections_close(found, reference.decode_nms(*widened(values), **options))

    def test_every_anchor_of_the_network_in_every_class(self, device: torch.device) -> None:
        values = random_predictions(1, 8_732, 81)
        found = decode_nms(*values.to(device), score_threshold=0.0)
        assert_detections_close(found, reference.decode_nms(*widened(values), score_threshold=0.0))

    @pytest.mark.parametrize("iou_threshold", [0.5, 1.0])
    def test_of_identical_boxes_with_identical_scores_one_remains(
        self, device: torch.device, iou_threshold: float
    ) -> None:
        anchors = torch.tensor([[0.5, 0.5, 0.25, 0.25]]).repeat(300, 1)
        values = DecodeInput(torch.zeros(2, 300, 4), torch.zeros(2, 300, 3), anchors).to(device)
        found = decode_nms(*values, iou_threshold=iou_threshold, max_per_class=1_000, max_detections=1_000)
        assert found.counts.tolist() == [2, 2]
        assert found.labels[:, :3].tolist() == [[1, 2, 0]] * 2
        assert found.boxes_ltrb[:, 0].tolist() == [[0.375, 0.375, 0.625, 0.625]] * 2

    @pytest.mark.parametrize("score_threshold", [0.05, 1.0])
    def test_where_nothing_is_likely_enough_every_row_is_zero(
        self, device: torch.device, score_threshold: float
    ) -> None:
        values = random_predictions(2, 500, 6).to(device)
        values.logits[..., 0] += 20
        found = decode_nms(*values, score_threshold=score_threshold)
        assert not any(tensor.any() for tensor in found)
        assert found.scores.shape == (2, 200)

    def test_probability_or_overlap_of_exactly_the_threshold_is_dropped(self, device: torch.device) -> None:
        even = DecodeInput(torch.zeros(1, 2, 4), torch.zeros(1, 2, 2), pyramid_anchors(2)).to(device)
        assert decode_nms(*even, score_threshold=0.5).counts.tolist() == [0]
        assert decode_nms(*even, score_threshold=math.nextafter(0.5, 0) - 1e-7).counts.gt(0).all()
        boxes = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 0.5], [0, 0, 0.25, 0.4375]])
        logits = torch.tensor([[[0, 3.0], [0, 2.0], [0, 1.0]]])
        values = DecodeInput(torch.zeros(1, 3, 4), logits, reference.ltrb_to_cxcywh(boxes)).to(device)
        assert decode_nms(*values, iou_threshold=0.5).boxes_ltrb[0, :2].tolist() == boxes[[0, 2]].tolist()

    @pytest.mark.parametrize("score_threshold", [1e-6, 1e-3, 0.05, 0.5])
    def test_no_probability_just_above_the_threshold_is_missed(
        self, device: torch.device, score_threshold: float
    ) -> None:
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
        self, device: torch.device, name: str, value: float, dtype: torch.dtype
    ) -> None:
        for column in range(4):
            boxes = torch.tensor([[0, 0, 0.25, 0.25], [0.5, 0, 0.75, 0.25], [0, 0.5, 0.25, 0.75]])
            anchors = reference.ltrb_to_cxcywh(boxes)
            values = DecodeInput(torch.zeros(1, 3, 4, dtype=dtype), torch.zeros(1, 3, 5, dtype=dtype), anchors)
            getattr(values, name)[..., 1, column] = value
            found = decode_nms(*values.to(device))
            assert found.counts.tolist() == [8]
            assert sorted(map(tuple, found.boxes_ltrb[0, :8].unique(dim=0).tolist())) == sorted(
                map(tuple, boxes[[0, 2]].tolist())
            )

    def test_a_box_too_large_for_float32_gives_no_detection(self, device: torch.device) -> None:
        values = DecodeInput(torch.zeros(2, 4, 4), torch.zeros(2, 4, 2), pyramid_anchors(4)).to(device)
        values.deltas[0, 2, 3] = 1_000
        values.deltas[1, 1, 0] = 3.4e38
        values.anchors_cxcywh[1, 2] = 20
        assert decode_nms(*values, iou_threshold=1.0).counts.tolist() == [3, 3]

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    def test_storage_and_number_types_of_the_input_do_not_matter(
        self, device: torch.device, dtype: torch.dtype
    ) -> None:
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
    def test_empty_input_has_no_detections(self, device: torch.device, batch_size: int, num_anchors: int) -> None:
        found = decode_nms(*random_predictions(batch_size, num_anchors, 3).to(device))
        assert found.boxes_ltrb.shape == (batch_size, 200, 4)
        assert found.counts.tolist() == [0] * batch_size
        assert not found.boxes_ltrb.any()

    @pytest.mark.parametrize("max_detections", [2**40, 2**62, 2**63 - 1])
    def test_a_limit_beyond_all_memory_is_an_error(self, max_detections: int) -> None:
        with pytest.raises(RuntimeError):
            decode_nms(*random_predictions(1, 5, 3), max_detections=max_detections)

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
            ("max_detections", -1, "= -1: expected at least 1"),
        ],
    )
    def test_bad_input_is_named(self, device: torch.device, name: str, value: Any, complaint: str) -> None:
        inputs = random_predictions(2, 5, 3)._asdict() | {name: value}
        with pytest.raises(ValueError, match=f"^{name} {complaint}"):
            decode_nms(**{key: x.to(device) if isinstance(x, Tensor) else x for key, x in inputs.items()})

    def test_float64_is_refused(self, device: torch.device) -> None:
        with pytest.raises(ValueError, match=r"^deltas is torch\.float64: expected float16, bfloat16 or float32"):
            decode_nms(*widened(random_predictions(2, 5, 3)).to(device))


class Call(NamedTuple):
    """One call of an operator: its public function, the operator below it, and arguments that suit both."""

    function: Callable
    operator: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]


def calls(device: torch.device, num_images: int = 2, num_anchors: int = 130) -> dict[str, Call]:
    truths = ground_truths([3, 0, 5, 1, 40, 2, 7, 1][:num_images]).to(device)
    values = loss_input(num_images, num_anchors, 7, positive_share=0.05).to(device)
    predictions = decode_input(num_images, num_anchors, 7).to(device)
    limits = {"score_threshold": 0.05, "iou_threshold": 0.5, "max_per_class": 20, "max_detections": 30}
    operators = torch.ops.ssd_fast
    return {
        "encode_boxes": Call(
            encode_boxes,
            operators.encode_boxes.default,
            (*truths, pyramid_anchors(num_anchors).to(device)),
            {"iou_threshold": 0.5, "tie_ranks": torch.arange(num_anchors, device=device).flip(0)},
        ),
        "multibox_loss": Call(multibox_loss, operators.multibox_loss.default, (*values,), {}),
        "decode_nms": Call(decode_nms, operators.decode_nms.default, (*predictions,), limits),
    }


OPERATORS = ["encode_boxes", "multibox_loss", "decode_nms"]


class TestEveryOperator:
    @pytest.mark.parametrize("name", OPERATORS)
    def test_two_runs_give_the_same_bits_whatever_the_number_of_threads(
        self, device: torch.device, name: str, set_num_threads: Callable[[int], None]
    ) -> None:
        call = calls(device, 8, 8_732)[name]
        set_num_threads(1)
        first = call.function(*call.arguments, **call.options)
        for num_threads in (1, 2, 2, 3):
            set_num_threads(num_threads)
            assert_same_bits(call.function(*call.arguments, **call.options), first)

    def test_two_backward_passes_give_the_same_bits_whatever_the_number_of_threads(
        self, device: torch.device, set_num_threads: Callable[[int], None]
    ) -> None:
        values = LossInput(*calls(device, 8, 8_732)["multibox_loss"].arguments)
        set_num_threads(1)
        first = run_loss(multibox_loss, values, *torch.ones(2, 8))
        for num_threads in (1, 2, 2, 3):
            set_num_threads(num_threads)
            assert_same_bits(run_loss(multibox_loss, values, *torch.ones(2, 8)), first)

    @pytest.mark.parametrize("name", OPERATORS)
    def test_a_batch_gives_what_its_images_give_alone(self, device: torch.device, name: str) -> None:
        arguments = calls(device, 4, 500)[name].arguments
        if name == "encode_boxes":
            boxes, labels, offsets, anchors = arguments
            whole = encode_boxes(*arguments)
            alone = [
                encode_boxes(
                    boxes[begin:end], labels[begin:end], torch.tensor([0, end - begin], device=device), anchors
                )
                for begin, end in pairwise(offsets.tolist())
            ]
        else:
            function = calls(device)[name].function
            whole = function(*arguments)
            alone = [
                function(*(x[i : i + 1] if x.dim() == 3 or name == "multibox_loss" else x for x in arguments))
                for i in range(4)
            ]
        assert_same_bits(tuple(torch.cat(parts) for parts in zip(*alone, strict=True)), whole)

    @pytest.mark.parametrize("name", OPERATORS)
    def test_no_input_is_changed(self, device: torch.device, name: str) -> None:
        call = calls(device)[name]
        before = [x.clone() for x in call.arguments]
        call.function(*call.arguments, **call.options)
        assert_same_bits(call.arguments, tuple(before))

    @pytest.mark.parametrize("name", OPERATORS)
    def test_tensors_of_two_devices_are_an_error_that_names_one(self, device: torch.device, name: str) -> None:
        call = calls(device)[name]
        elsewhere = torch.device("meta" if device.type == "cpu" else "cpu")
        places = [*range(len(call.arguments)), *(key for key, x in call.options.items() if isinstance(x, Tensor))]
        for place in places:
            arguments = dict(enumerate(call.arguments)) | call.options
            arguments[place] = arguments[place].to(elsewhere)
            options = {key: arguments.pop(key) for key in call.options}
            with pytest.raises(ValueError, match=r"^\w+ is on (meta|cpu|cuda:0): expected (meta|cpu|cuda:0), like"):
                call.function(*arguments.values(), **options)

    @pytest.mark.parametrize("name", OPERATORS)
    def test_what_is_no_tensor_or_no_dense_one_is_an_error(self, device: torch.device, name: str) -> None:
        call = calls(device)[name]
        for place in range(len(call.arguments)):
            for value in (None, "text", 3, call.arguments[place].to_sparse()):
                arguments = list(call.arguments)
                arguments[place] = value
                with pytest.raises((RuntimeError, TypeError, AttributeError, ValueError)):
                    call.operator(*arguments, *call.options.values())

    @pytest.mark.parametrize("name", OPERATORS)
    def test_schema_fake_implementation_and_autograd_agree_with_the_operator(
        self, device: torch.device, name: str
    ) -> None:
        call = calls(device)[name]
        arguments = call.arguments
        if name == "multibox_loss":
            arguments = tuple(x.requires_grad_(place < 2) for place, x in enumerate(arguments))
        torch.library.opcheck(call.operator, (*arguments, *call.options.values()))

    def test_schema_and_fake_implementation_agree_with_the_backward_pass(self, device: torch.device) -> None:
        values = loss_input(2, 130, 7, torch.float16, positive_share=0.05).to(device)
        _, _, log_normalisers, num_positives = torch.ops.ssd_fast.multibox_loss(*values)
        ones = torch.ones(2, device=device)
        arguments = (ones, ones.clone(), *values, log_normalisers, num_positives)
        torch.library.opcheck(torch.ops.ssd_fast.multibox_loss_backward.default, arguments)

    @pytest.mark.parametrize("name", OPERATORS)
    def test_compiled_by_torch_in_one_graph_it_gives_the_same(self, device: torch.device, name: str) -> None:
        call = calls(device)[name]
        compiled = torch.compile(lambda *arguments: call.function(*arguments, **call.options), fullgraph=True)
        if name == "multibox_loss":
            ones = torch.ones(2, 2, device=device)
            values = LossInput(*call.arguments)
            assert_same_bits(run_loss(compiled, values, *ones), run_loss(multibox_loss, values, *ones))
        else:
            assert_same_bits(compiled(*call.arguments), call.function(*call.arguments, **call.options))

    @ON_A_GPU
    @pytest.mark.parametrize("name", OPERATORS)
    def test_replayed_as_a_cuda_graph_it_gives_what_it_gives_for_the_new_input(
        self, device: torch.device, name: str
    ) -> None:
        call = calls(device, 4, 8_732)[name]
        fresh = [x.flip(0) if place < 2 else x.clone() for place, x in enumerate(call.arguments)]

        def run(arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            if name != "multibox_loss":
                return call.function(*arguments, **call.options)
            return run_loss(multibox_loss, LossInput(*arguments), *torch.ones(2, 4, device=device))

        expected = run(tuple(fresh))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run(call.arguments)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = run(call.arguments)
        for static, new in zip(call.arguments, fresh, strict=True):
            static.copy_(new)
        graph.replay()
        assert_same_bits(results, expected)

    @ON_A_GPU
    @pytest.mark.parametrize("name", OPERATORS)
    def test_the_host_does_not_wait_for_the_gpu(self, device: torch.device, name: str) -> None:
        call = calls(device, 4, 8_732)[name]
        torch.cuda.set_sync_debug_mode("error")
        try:
            call.function(*call.arguments, **call.options)
        finally:
            torch.cuda.set_sync_debug_mode("default")
