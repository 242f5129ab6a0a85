"""Inputs of the compiled operators, and support for the tests of all of them.

Needs torch, pytest and hypothesis alone, so that the tests run on a bare machine with a GPU.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from box_samples import random_boxes, seeded
from torch import Tensor

from kernels import Detections, Targets, cuda_build, multibox_loss, reference
from kernels.boxes import cxcywh_to_ltrb, iou_matrix, ltrb_to_cxcywh

EMULATED = cuda_build().startswith("CUDA emulated")  # the CUDA sources, compiled for the CPU (tests/cuda_on_cpu)
CUDA = torch.cuda.is_available() and not EMULATED and not cuda_build().startswith("CUDA not built")
DEVICES = ["cpu", "cuda"] if CUDA else ["cpu"]
FLOATS = [torch.float16, torch.bfloat16, torch.float32]
ON_A_GPU = pytest.mark.parametrize(
    "device",
    [pytest.param(torch.device("cuda"), id="cuda", marks=pytest.mark.skipif(not CUDA, reason="no GPU, or no kernels"))],
)
BY_CUDA_SOURCES = pytest.mark.parametrize(
    "device",
    [
        pytest.param(
            torch.device("cpu" if EMULATED else "cuda"),
            id="cuda sources",
            marks=pytest.mark.skipif(not (CUDA or EMULATED), reason="no GPU, no kernels, and no emulation"),
        )
    ],
)
NAN, INF = math.nan, math.inf
# Grid size and anchors per cell of every level, by number of anchors.
PYRAMIDS = {
    8_732: [(38, 4), (19, 6), (10, 6), (5, 6), (3, 4), (1, 4)],
    15_130: [(50, 4), (25, 6), (13, 6), (7, 6), (3, 4), (3, 4)],
}


def looks_at_values(device: torch.device) -> bool:
    """Whether the build for a device refuses values that it cannot use; one for GPUs would have to wait for them."""
    return device.type == "cpu" and not EMULATED


def pyramid_anchors(num_anchors: int) -> Tensor:
    """[A, 4] cxcywh laid out like the network's; random if no network has num_anchors of them."""
    if num_anchors not in PYRAMIDS:
        return ltrb_to_cxcywh(random_boxes(num_anchors, seeded(num_anchors)))
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
    """Random boxes, labelled 1 to 80. counts: the number of boxes of each image."""
    generator = seeded(seed)
    labels = torch.randint(1, 81, (sum(counts),), generator=generator, dtype=torch.int32)
    return GroundTruths(random_boxes(sum(counts), generator), labels, torch.tensor([0, *counts]).cumsum(0))


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
    batch_size, num_anchors = target_labels.shape
    return loss_input(batch_size, num_anchors, num_classes, dtype)._replace(target_labels=target_labels)


def run_loss(operator: Callable, values: LossInput, grad_box: Tensor, grad_class: Tensor) -> LossResult:
    deltas, logits = (x.detach().requires_grad_() for x in values[:2])
    parts = operator(deltas, logits, *values[2:])
    grads = [grad.to(parts.box) for grad in (grad_box, grad_class)]
    return LossResult(*(x.detach() for x in parts), *torch.autograd.grad(parts, (deltas, logits), grads))


class DecodeInput(NamedTuple):
    deltas: Tensor
    logits: Tensor
    anchors_cxcywh: Tensor

    def to(self, device: torch.device) -> "DecodeInput":
        return DecodeInput(*(tensor.to(device) for tensor in self))


def decode_input(
    batch_size: int, num_anchors: int, num_classes: int, dtype: torch.dtype = torch.float32, *, seed: int = 0
) -> DecodeInput:
    """Predictions like a trained network's: background, except for the anchors around a few objects."""
    generator, anchors = seeded(seed), pyramid_anchors(num_anchors)
    deltas = torch.randn(batch_size, num_anchors, 4, generator=generator) * 0.5
    logits = torch.randn(batch_size, num_anchors, num_classes, generator=generator)
    logits[..., 0] += 7
    for image in range(batch_size):
        objects = random_boxes(12, generator)
        classes = torch.randint(1, num_classes, (12,), generator=generator)
        ious, owners = iou_matrix(objects, cxcywh_to_ltrb(anchors)).max(dim=0)
        near = (ious > 0.4).nonzero().flatten()
        logits[image, near, classes[owners[near]]] += 12 * ious[near]
    return DecodeInput(deltas.to(dtype), logits.to(dtype), anchors)


def random_predictions(batch_size: int, num_anchors: int, num_classes: int, seed: int = 0) -> DecodeInput:
    """Predictions like an untrained network's: every class is likely everywhere."""
    generator = seeded(seed)
    deltas, logits = (torch.randn(batch_size, num_anchors, size, generator=generator) for size in (4, num_classes))
    return DecodeInput(deltas, logits, pyramid_anchors(num_anchors))


def widened(values: DecodeInput) -> DecodeInput:
    return DecodeInput(*(tensor.double() for tensor in values))


def assert_targets_equal(found: Targets, expected: Targets) -> None:
    assert found.labels.dtype == torch.int32
    assert torch.equal(found.labels.cpu(), expected.labels)
    torch.testing.assert_close(found.deltas.cpu(), expected.deltas, rtol=2e-6, atol=2e-6)
    assert found.deltas.cpu()[expected.labels == 0].eq(0).all()


def assert_loss_equals_plain(
    device: torch.device, values: LossInput, grad_box: Tensor | None = None, grad_class: Tensor | None = None
) -> LossResult:
    """Compare losses and gradients with those of the plain version in float64, infinities and NaNs included."""
    batch_size, dtype = values.deltas.shape[0], values.deltas.dtype
    default = torch.rand(2, batch_size, generator=seeded(9)) + 0.5
    grads = (default[0] if grad_box is None else grad_box, default[1] if grad_class is None else grad_class)
    wide = LossInput(*(x.double() if x.is_floating_point() else x for x in values))
    expected = run_loss(reference.multibox_loss, wide, *grads)
    # An anchor outside the loss has no gradient, but plain torch makes 0 x NaN of one that is not finite.
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


def assert_detections_close(found: Detections, expected: Detections) -> None:
    """Compare detections up to float32 rounding. Among scores that rounding makes equal, any order is right."""
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
        in_place = ((rows[:count] - wanted[:count]).abs() <= tolerance).all(dim=-1)
        rows, wanted, tolerance = rows[:count][~in_place], wanted[:count][~in_place], tolerance[~in_place]
        alike = ((rows[:, None] - wanted).abs() <= tolerance).all(dim=-1)  # each row with each
        assert alike.any(dim=0).all()
        assert alike.any(dim=1).all()
