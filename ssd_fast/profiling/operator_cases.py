"""Inputs and implementations of the operators: ours, plain torch, and what one would use in their place.

Boxes, targets and anchors are float32; deltas and logits are float32 on the CPU and float16 on a GPU.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.ops import batched_nms, nms

import kernels
from dali_pipelines.box_encoder import BoxEncoder
from kernels import reference
from kernels.boxes import cxcywh_to_ltrb
from kernels.constants import CENTRE_VARIANCE, SIZE_VARIANCE
from kernels.types import Detections, Targets
from ssd_fast.hardware import usable_cores

NUM_CLASSES = 81
BOXES_PER_IMAGE = (8, 60)  # COCO's mean is 7; one image in a hundred has more than 30
OURS, ORACLE = "kernels", "plain torch"

_SCORE_THRESHOLD, _IOU_THRESHOLD, _MAX_PER_CLASS, _MAX_DETECTIONS = 0.05, 0.5, 200, 200  # MLPerf's, and our defaults
_NUM_OBJECTS, _ANCHORS_PER_OBJECT, _NUM_STRAY = 12, 25, 50  # 350 candidates in all


class Implementation(NamedTuple):
    """One implementation of an operator, with its arguments.

    difference: distance of its result from the oracle's, in the unit of DIFFERENCE_UNITS; at most tolerance.
    overhead: a call that costs as much as the part of `run` around the operator.
    on_host: a call returns when its work is done, on a GPU too.
    failure: reason why it cannot run here.
    """

    name: str
    run: Callable[[], Any]
    difference: Callable[[Any, Any], float]
    tolerance: float
    overhead: Callable[[], Any] | None = None
    on_host: bool = False
    failure: str = ""


class Case(NamedTuple):
    """An operator on one input, with its implementations; OURS and ORACLE (`kernels.reference`) are among them.

    num_bytes: size of arguments and results, each counted once.
    measure_memory: measure the peak of memory too.
    """

    operator: str
    input: str
    batch_size: int
    num_anchors: int
    num_bytes: int
    implementations: tuple[Implementation, ...]
    measure_memory: bool = False


DIFFERENCE_UNITS = {
    "encode_boxes": "largest difference of a delta, with equal labels (DALI: except where rounding decides)",
    "multibox_loss": "largest difference of a loss or gradient, as a fraction of the largest value",
    "decode_nms": "fraction of the detections that have no counterpart within 1e-4",
}


def make_cases(anchors_cxcywh: Tensor, *, batch_size: int, seed: int = 0) -> Iterator[Case]:
    """Yield every operator with each of its inputs, on the device of the anchors [A, 4]."""
    generator = torch.Generator(anchors_cxcywh.device).manual_seed(seed)
    for boxes_per_image in BOXES_PER_IMAGE:
        yield encode_case(anchors_cxcywh, batch_size, boxes_per_image, generator)
    yield loss_case(anchors_cxcywh, batch_size, generator)
    for make_input in (network_like, every_anchor, identical_boxes, no_candidates):
        deltas, logits = make_input(anchors_cxcywh, batch_size, generator)
        yield decode_case(make_input.__name__.replace("_", " "), deltas, logits, anchors_cxcywh)


# ---- encode_boxes ----


def encode_case(anchors_cxcywh: Tensor, batch_size: int, boxes_per_image: int, generator: torch.Generator) -> Case:
    """Encoding of boxes_per_image random boxes in every image."""
    device = anchors_cxcywh.device
    boxes_ltrb = random_boxes((batch_size, boxes_per_image), generator)
    shape = (batch_size, boxes_per_image)
    labels = torch.randint(1, NUM_CLASSES, shape, dtype=torch.int32, device=device, generator=generator)
    offsets = torch.arange(0, boxes_ltrb[..., 0].numel() + 1, boxes_per_image, device=device)
    arguments = (boxes_ltrb.flatten(0, 1), labels.flatten(), offsets, anchors_cxcywh)
    anchors_ltrb = cxcywh_to_ltrb(anchors_cxcywh)
    arrays = [tensor.cpu().numpy() for tensor in (boxes_ltrb, labels, anchors_ltrb)]
    variances = (CENTRE_VARIANCE, SIZE_VARIANCE)
    by_dali, handed_on = (
        BoxEncoder(*arrays, variances=variances, device=device, num_threads=usable_cores(), encode=encode)
        for encode in (True, False)
    )

    def difference_up_to_rounding(result: tuple[Tensor, ...], expected: Targets) -> float:
        alike = torch.stack([~decided_by_rounding(reference.iou_matrix(boxes, anchors_ltrb)) for boxes in boxes_ltrb])
        return _targets_difference(
            Targets(*(part[alike] for part in result)), Targets(*(part[alike] for part in expected))
        )

    return Case(
        operator="encode_boxes",
        input=f"{boxes_per_image} boxes an image",
        batch_size=batch_size,
        num_anchors=len(anchors_cxcywh),
        num_bytes=sum(tensor.nbytes for tensor in arguments) + batch_size * len(anchors_cxcywh) * 5 * 4,
        implementations=(
            Implementation(OURS, partial(kernels.encode_boxes, *arguments), _targets_difference, 1e-4),
            Implementation(ORACLE, partial(reference.encode_boxes, *arguments), _targets_difference, 0.0),
            Implementation("DALI", by_dali, difference_up_to_rounding, 1e-3, overhead=handed_on, on_host=True),
        ),
    )


def random_boxes(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Boxes [*shape, 4] ltrb inside the image, with sides from 0.03 to 0.7 of it; small ones are more frequent."""
    sides = 0.03 * (0.7 / 0.03) ** torch.rand((*shape, 2), device=generator.device, generator=generator)
    corners = (1 - sides) * torch.rand((*shape, 2), device=generator.device, generator=generator)
    return torch.cat((corners, corners + sides), dim=-1)


def decided_by_rounding(ious: Tensor, iou_threshold: float = 0.5) -> Tensor:
    """[A] bool: anchors whose target depends on the last bits of IoUs [G, A] or on the rule for equal IoUs."""
    closeness = 1e-6
    best_of_box, best_of_anchor = ious.amax(dim=1, keepdim=True), ious.amax(dim=0)
    nearly_best = ious > best_of_box - closeness
    between_anchors = (nearly_best & (nearly_best.sum(dim=1, keepdim=True) > 1)).any(dim=0)
    between_boxes = (best_of_anchor > iou_threshold) & ((ious > best_of_anchor - closeness).sum(dim=0) > 1)
    return between_anchors | between_boxes | ((ious - iou_threshold).abs() < closeness).any(dim=0)


def _targets_difference(result: Targets, expected: Targets) -> float:
    if not torch.equal(result.labels, expected.labels):
        return torch.inf
    return _largest(result.deltas - expected.deltas)


# ---- multibox_loss ----


def loss_case(anchors_cxcywh: Tensor, batch_size: int, generator: torch.Generator) -> Case:
    """Loss and gradients of standard normal predictions, for the targets of eight boxes in every image."""
    device, num_anchors = anchors_cxcywh.device, len(anchors_cxcywh)
    boxes_ltrb = random_boxes((batch_size * 8,), generator)
    labels = torch.randint(1, NUM_CLASSES, (batch_size * 8,), dtype=torch.int32, device=device, generator=generator)
    offsets = torch.arange(0, batch_size * 8 + 1, 8, device=device)
    targets = reference.encode_boxes(boxes_ltrb, labels, offsets, anchors_cxcywh)
    deltas, logits = (
        _normal((batch_size, num_anchors, width), generator).to(_dtype(device)).requires_grad_()
        for width in (4, NUM_CLASSES)
    )
    arguments = (deltas, logits, *targets)
    compiled = torch.compile(reference.multibox_loss, dynamic=False)
    tolerance = 1e-5 if deltas.dtype == torch.float32 else 2e-3  # a gradient in float16 has 11 bits
    return Case(
        operator="multibox_loss",
        input="forward and backward",
        batch_size=batch_size,
        num_anchors=num_anchors,
        num_bytes=sum(tensor.nbytes for tensor in arguments) + deltas.nbytes + logits.nbytes,
        implementations=(
            Implementation(
                OURS, partial(_with_gradients, kernels.multibox_loss, *arguments), loss_difference, tolerance
            ),
            Implementation(ORACLE, partial(_with_gradients, reference.multibox_loss, *arguments), loss_difference, 0.0),
            Implementation(
                "torch.compile",
                partial(_with_gradients, compiled, *arguments),
                loss_difference,
                tolerance,
                failure=_failure(partial(_with_gradients, compiled, *arguments)),
            ),
        ),
        measure_memory=True,
    )


def _with_gradients(loss: Callable[..., kernels.LossParts], *arguments: Tensor) -> tuple[Tensor, ...]:
    """Losses of the images, and gradients of their sum with respect to deltas and logits."""
    box, class_ = loss(*arguments)
    return box.detach(), class_.detach(), *torch.autograd.grad(box.sum() + class_.sum(), arguments[:2])


def _failure(compiled: Callable[[], Any]) -> str:
    """Reason why a function cannot be compiled here (no C++ compiler, a GPU too old for Triton); empty if it can."""
    try:
        compiled()
    except RuntimeError as error:  # the common base of the compiler's many exceptions
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return ""


def loss_difference(result: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """Largest difference as a fraction of the largest expected value; NaN if there is one."""
    pairs = zip(result, expected, strict=True)
    ratios = [_largest(one.float() - other.float()) / max(_largest(other), 1e-30) for one, other in pairs]
    return float(torch.tensor(ratios).max())  # unlike Python's, this maximum keeps NaN


# ---- decode_nms ----


def network_like(anchors_cxcywh: Tensor, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Deltas and logits like those of a trained network: background, and 350 candidates an image.

    300 candidates are the 25 anchors nearest to each of 12 objects: their boxes are close to the object's, and most
    have its class. 50 are alone, anywhere. Probabilities of candidates are between 0.06 and 0.95.
    """
    device, num_anchors = anchors_cxcywh.device, len(anchors_cxcywh)
    deltas, logits = _background(anchors_cxcywh, batch_size, generator)
    uniform = partial(torch.rand, device=device, generator=generator)
    per_object = min(_ANCHORS_PER_OBJECT, num_anchors)
    shape = (batch_size, _NUM_OBJECTS, per_object)

    objects_ltrb = random_boxes(shape[:2], generator)
    nearest = reference.iou_matrix(objects_ltrb, cxcywh_to_ltrb(anchors_cxcywh)).topk(per_object).indices  # shape
    images = torch.arange(batch_size, device=device).view(-1, 1, 1).expand(shape)
    exact = reference.encode_deltas(objects_ltrb.unsqueeze(2).expand(*shape, 4), anchors_cxcywh[nearest])
    deltas[images, nearest] = exact + 0.5 * _normal((*shape, 4), generator)

    classes = torch.randint(1, NUM_CLASSES, shape[:2], device=device, generator=generator).unsqueeze(2).expand(shape)
    mistaken = torch.randint(1, NUM_CLASSES, shape, device=device, generator=generator)
    classes = torch.where(uniform(shape) < 0.8, classes, mistaken)
    stray = (batch_size, _NUM_STRAY)
    rows = (
        torch.cat((images.flatten(1), torch.arange(batch_size, device=device).view(-1, 1).expand(stray)), dim=1),
        torch.cat((nearest.flatten(1), torch.randint(num_anchors, stray, device=device, generator=generator)), dim=1),
    )
    classes = torch.cat(
        (classes.flatten(1), torch.randint(1, NUM_CLASSES, stray, device=device, generator=generator)), dim=1
    )
    probabilities = 0.06 + 0.89 * uniform(classes.shape)
    log_odds = (probabilities / (1 - probabilities)).log()
    logits[*rows, classes] = logits[rows].logsumexp(dim=-1) + log_odds
    return _as_predictions(deltas, logits)


def every_anchor(anchors_cxcywh: Tensor, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random boxes; every anchor is above the threshold in 19 classes, the largest possible number."""
    num_classes = round(1 / _SCORE_THRESHOLD) - 1
    shape = (batch_size, len(anchors_cxcywh), NUM_CLASSES - 1)
    chosen = 1 + torch.rand(shape, device=anchors_cxcywh.device, generator=generator).topk(num_classes).indices
    # Nearly equal, so that none falls below the threshold; around 0, where float16 tells them apart.
    nearly_equal = 0.02 * (2 * torch.rand(chosen.shape, device=anchors_cxcywh.device, generator=generator) - 1)
    logits = torch.full((*shape[:2], NUM_CLASSES), -12.0, device=anchors_cxcywh.device).scatter(2, chosen, nearly_equal)
    return _as_predictions(_normal((*shape[:2], 4), generator), logits)


def identical_boxes(anchors_cxcywh: Tensor, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Logits of `every_anchor`; all anchors give the same box."""
    deltas, logits = every_anchor(anchors_cxcywh, batch_size, generator)
    box_ltrb = anchors_cxcywh.new_tensor((0.3, 0.2, 0.7, 0.8)).expand_as(anchors_cxcywh)
    return reference.encode_deltas(box_ltrb, anchors_cxcywh).to(deltas.dtype).expand_as(deltas).contiguous(), logits


def no_candidates(anchors_cxcywh: Tensor, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random boxes; every anchor is background."""
    return _as_predictions(*_background(anchors_cxcywh, batch_size, generator))


def _background(anchors_cxcywh: Tensor, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    shape = (batch_size, len(anchors_cxcywh))
    logits = 0.5 * _normal((*shape, NUM_CLASSES), generator)
    logits[..., 0] += 9
    return _normal((*shape, 4), generator), logits


def decode_case(input_: str, deltas: Tensor, logits: Tensor, anchors_cxcywh: Tensor) -> Case:
    """Decoding of given predictions."""
    batch_size, num_anchors, _ = deltas.shape
    arguments = (deltas, logits, anchors_cxcywh)
    results = kernels.decode_nms(*arguments)
    tolerance = 0.02  # in `every_anchor` the last bit of a probability decides which 200 are the best
    return Case(
        operator="decode_nms",
        input=input_,
        batch_size=batch_size,
        num_anchors=num_anchors,
        num_bytes=sum(tensor.nbytes for tensor in (*arguments, *results)),
        implementations=(
            Implementation(OURS, partial(kernels.decode_nms, *arguments), unmatched, tolerance),
            Implementation(ORACLE, partial(reference.decode_nms, *arguments), unmatched, 0.0),
            Implementation("nms per class", partial(decode_per_class, *arguments), unmatched, tolerance),
            Implementation("batched_nms", partial(decode_batched, *arguments), unmatched, tolerance),
        ),
    )


def decode_per_class(deltas: Tensor, logits: Tensor, anchors_cxcywh: Tensor) -> Detections:
    """`decode_nms` with one torchvision.ops.nms for every class of every image, as the MLPerf reference does."""
    boxes, scores = _decoded(deltas, logits, anchors_cxcywh)
    found = []
    for image_boxes, image_scores in zip(boxes, scores, strict=True):
        parts = []
        for class_ in range(1, NUM_CLASSES):
            (anchors,) = (image_scores[:, class_] > _SCORE_THRESHOLD).nonzero(as_tuple=True)
            if not len(anchors):
                continue
            best, order = image_scores[anchors, class_].topk(min(_MAX_PER_CLASS, len(anchors)))
            candidates = image_boxes[anchors[order]]
            kept = nms(candidates, best, _IOU_THRESHOLD)
            parts.append((candidates[kept], best[kept], torch.full_like(kept, class_)))
        found.append(tuple(map(torch.cat, zip(*parts, strict=True))) if parts else None)
    return _best(found, boxes)


def decode_batched(deltas: Tensor, logits: Tensor, anchors_cxcywh: Tensor) -> Detections:
    """`decode_nms` with one torchvision.ops.batched_nms for every image."""
    boxes, scores = _decoded(deltas, logits, anchors_cxcywh)
    found = []
    for image_boxes, image_scores in zip(boxes, scores, strict=True):
        anchors, classes = (image_scores[:, 1:] > _SCORE_THRESHOLD).nonzero(as_tuple=True)
        classes = classes + 1
        candidate_scores = image_scores[anchors, classes]
        if len(anchors) > _MAX_PER_CLASS:
            order = candidate_scores.argsort(descending=True)
            order = order[classes[order].argsort(stable=True)]  # by class, and within it best first
            in_order = classes[order]
            ranks = torch.arange(len(order), device=order.device) - torch.searchsorted(in_order, in_order)
            entering = order[ranks < _MAX_PER_CLASS]
            anchors, classes = anchors[entering], classes[entering]
            candidate_scores = candidate_scores[entering]
        candidates = image_boxes[anchors]
        kept = batched_nms(candidates, candidate_scores, classes, _IOU_THRESHOLD)
        found.append((candidates[kept], candidate_scores[kept], classes[kept]))
    return _best(found, boxes)


def _decoded(deltas: Tensor, logits: Tensor, anchors_cxcywh: Tensor) -> tuple[Tensor, Tensor]:
    return reference.decode_deltas(deltas.float(), anchors_cxcywh), logits.float().softmax(dim=-1)


def _best(found: Sequence[tuple[Tensor, ...] | None], boxes: Tensor) -> Detections:
    """The best detections of every image. found: boxes, scores and labels of each image; None if it has none."""
    batch_size = len(found)
    detections = Detections(
        boxes_ltrb=boxes.new_zeros(batch_size, _MAX_DETECTIONS, 4),
        scores=boxes.new_zeros(batch_size, _MAX_DETECTIONS),
        labels=boxes.new_zeros(batch_size, _MAX_DETECTIONS, dtype=torch.int32),
        counts=boxes.new_zeros(batch_size, dtype=torch.int32),
    )
    for image, parts in enumerate(found):
        if parts is None:
            continue
        image_boxes, scores, labels = parts
        best, order = scores.topk(min(_MAX_DETECTIONS, len(scores)))
        detections.boxes_ltrb[image, : len(order)] = image_boxes[order]
        detections.scores[image, : len(order)] = best
        detections.labels[image, : len(order)] = labels[order].to(torch.int32)
        detections.counts[image] = len(order)
    return detections


def unmatched(result: Detections, expected: Detections) -> float:
    """Fraction of the detections of both that have no counterpart (box, score and label) in the other."""
    missing = 0
    for image in range(len(expected.counts)):
        one, other = (_table(detections, image) for detections in (result, expected))
        same = torch.cdist(one, other, p=torch.inf) < 1e-4  # [N, M]
        missing += int((~same.any(dim=1)).sum()) + int((~same.any(dim=0)).sum())
    return missing / max(1, int(result.counts.sum() + expected.counts.sum()))


def _table(detections: Detections, image: int) -> Tensor:
    """Detections of an image, [N, 6]: box, score, label."""
    count = int(detections.counts[image])
    columns = (detections.boxes_ltrb[image], detections.scores[image, :, None], detections.labels[image, :, None])
    return torch.cat(columns, dim=1)[:count]


# ---- tensors ----


def _dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else torch.float16


def _as_predictions(deltas: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    return deltas.to(_dtype(deltas.device)), logits.to(_dtype(logits.device))


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, device=generator.device, generator=generator)


def _largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0
