"""The detector's operators in plain torch: the specification, and the oracle of every faster version.

The functions work on any device and compute in the precision of their arguments (16-bit input in float32), so that
float64 input gives a result to compare others with. Boxes are fractions of the image's width and height.

The rules are those of the MLPerf SSD reference. Where it is silent or wrong, the docstring states the rule.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.boxes import cxcywh_to_ltrb, decode_deltas, encode_deltas, iou_matrix
from kernels.constants import NEGATIVES_PER_POSITIVE
from kernels.types import Detections, LossParts, Targets


@torch.no_grad()
def resize_normalise(
    images: Sequence[Tensor], size: int, *, matrices: Tensor, mirrored: Tensor, low: Tensor, high: Tensor
) -> Tensor:
    """The network's input from decoded images.

    images: B times uint8 [H, W, 3], of any sizes.
    matrices: [B, 3, 4]: channel c of a pixel p becomes matrices[b, c, :3] . p + matrices[b, c, 3], clamped to low[c]
        and high[c]. So one matrix changes colours and normalises; low and high are what black and white become.
    mirrored: [B] bool, images whose left and right are exchanged.

    Returns [B, size, size, 3] in the precision of the matrices. The resize is bilinear with antialiasing, as Pillow's:
    each pixel is a mean over its triangle in the image, rounded to 8 bits.
    """
    rows = []
    for image, matrix, mirror in zip(images, matrices, mirrored.tolist(), strict=True):
        planes = image.permute(2, 0, 1)[None].to(matrices.dtype)
        resized = F.interpolate(planes, (size, size), mode="bilinear", antialias=True).clamp(0, 255).round()[0]
        pixels = resized.permute(1, 2, 0) @ matrix[:, :3].T + matrix[:, 3]
        pixels = torch.minimum(torch.maximum(pixels, low), high)
        rows.append(pixels.flip(1) if mirror else pixels)
    return torch.stack(rows) if rows else matrices.new_empty(0, size, size, 3)


@torch.no_grad()
def encode_boxes(
    boxes_ltrb: Tensor,
    labels: Tensor,
    offsets: Tensor,
    anchors_cxcywh: Tensor,
    *,
    iou_threshold: float = 0.5,
    tie_ranks: Tensor | None = None,
) -> Targets:
    """Targets of every anchor from the ground truths of a batch of images.

    boxes_ltrb: [T, 4] float32 or float64, the ground truths of all images one after the other.
    labels: [T] int32 or int64, at least 1.
    offsets: [B + 1] int64; the ground truths of image b are rows offsets[b] to offsets[b + 1].
    anchors_cxcywh: [A, 4], converted to the precision of the boxes.
    tie_ranks: [A] int64, a permutation: the rank of every anchor; among anchors of equal IoU the lowest rank wins.
        None: the rank is the index. A small box lies within many anchors of the same area, so another order gives
        other targets in a tenth of COCO's images (170 of 1,500 of val2017, at SSD300).

    An anchor belongs to the ground truth that it overlaps best, if their IoU is above iou_threshold (not equal to it).
    In addition, every ground truth takes the anchor that overlaps it best, whichever ground truth that anchor belonged
    to. Among equal IoUs the first ground truth and the anchor of lowest tie rank win. If several ground truths share a
    best anchor, the last of them takes it, and the others may end without an anchor. All other anchors are background,
    and so are all anchors of an image without boxes. Deterministic.

    Raises ValueError for a wrong shape, dtype or device, boxes without area, labels below 1, offsets that do not
    partition the boxes, or a threshold outside 0 to 1.
    Source: Liu et al. 2016, section 2.2; ties as in the MLPerf reference.
    """
    _check_ground_truths(boxes_ltrb, labels, offsets)
    _check_fraction(iou_threshold, "iou_threshold")
    _check(anchors_cxcywh, "anchors_cxcywh", (None, 4), device=boxes_ltrb.device)
    if anchors_cxcywh.shape[0] == 0:
        raise ValueError("anchors_cxcywh has 0 rows: expected at least one anchor")
    if tie_ranks is None:
        by_tie_rank = torch.arange(anchors_cxcywh.shape[0], device=boxes_ltrb.device)
    else:
        _check(tie_ranks, "tie_ranks", anchors_cxcywh.shape[:1], kind="integer", device=boxes_ltrb.device)
        by_tie_rank = tie_ranks.argsort()
    anchors = anchors_cxcywh.to(boxes_ltrb.dtype)
    bounds = offsets.tolist()
    batch_size, num_anchors = len(bounds) - 1, anchors.shape[0]
    deltas = boxes_ltrb.new_zeros(batch_size, num_anchors, 4)
    target_labels = labels.new_zeros(batch_size, num_anchors, dtype=torch.int32)
    for image, (begin, end) in enumerate(pairwise(bounds)):
        if begin == end:
            continue
        boxes = boxes_ltrb[begin:end]
        ious = iou_matrix(boxes, cxcywh_to_ltrb(anchors))  # [G, A]
        owners = _match(ious, by_tie_rank, iou_threshold)  # [A]
        positive = owners >= 0
        deltas[image, positive] = encode_deltas(boxes[owners[positive]], anchors[positive])
        target_labels[image, positive] = labels[begin:end][owners[positive]].to(torch.int32)
    return Targets(deltas=deltas, labels=target_labels)


def multibox_loss(deltas: Tensor, logits: Tensor, target_deltas: Tensor, target_labels: Tensor) -> LossParts:
    """Box and class loss of every image; differentiable in deltas and logits.

    deltas: [B, A, 4] and logits: [B, A, C] floating point (16-bit is computed in float32), C >= 2.
    target_deltas: [B, A, 4] floating point; target_labels: [B, A] int32 or int64, 0 (background) to C - 1.

    box: SmoothL1 (beta 1), summed over the four deltas of all positive anchors.
    class_: cross-entropy, summed over all positives and over the hardest background anchors: three for each positive,
        or all if there are fewer. The hardest have the largest cross-entropy; among equals the lower anchor index
        comes first.
    Both are divided by the image's number of positives; an image without positives has loss 0. Background anchors that
    are not chosen have gradient 0. The host does not wait for the device, so labels out of range are not looked for.

    Raises ValueError for a wrong shape, dtype or device.
    Source: Liu et al. 2016, eq. 1 and section 2.2. Unlike in the MLPerf reference, a positive never counts twice.
    """
    _check(deltas, "deltas", (None, None, 4))
    batch_size, num_anchors, _ = deltas.shape
    _check(logits, "logits", (batch_size, num_anchors, None), device=deltas.device)
    _check_num_classes(logits)
    _check(target_deltas, "target_deltas", (batch_size, num_anchors, 4), device=deltas.device)
    _check(target_labels, "target_labels", (batch_size, num_anchors), kind="integer", device=deltas.device)
    dtype = torch.promote_types(torch.promote_types(deltas.dtype, logits.dtype), torch.float32)

    positive = target_labels > 0  # [B, A]
    num_positives = positive.sum(dim=1)

    box_losses = F.smooth_l1_loss(deltas.to(dtype), target_deltas.to(dtype), reduction="none").sum(dim=-1)
    class_losses = F.cross_entropy(
        logits.to(dtype).flatten(0, 1), target_labels.flatten().long(), reduction="none"
    ).view_as(target_labels)

    hardness = class_losses.detach().masked_fill(positive, -torch.inf)
    hardest_first = hardness.sort(dim=1, descending=True, stable=True).indices
    num_hard = torch.minimum(NEGATIVES_PER_POSITIVE * num_positives, num_anchors - num_positives)
    places = torch.arange(num_anchors, device=deltas.device)
    hard = torch.zeros_like(positive).scatter(1, hardest_first, places < num_hard.unsqueeze(1))

    divisor = num_positives.clamp(min=1)
    return LossParts(
        box=torch.where(positive, box_losses, 0).sum(dim=1) / divisor,
        class_=torch.where(positive | hard, class_losses, 0).sum(dim=1) / divisor,
    )


@torch.no_grad()
def decode_nms(
    deltas: Tensor,
    logits: Tensor,
    anchors_cxcywh: Tensor,
    *,
    score_threshold: float = 0.05,
    iou_threshold: float = 0.5,
    max_per_class: int = 200,
    max_detections: int = 200,
) -> Detections:
    """Detections in a batch of images: softmax, box decoding, greedy non-maximum suppression per class, best of all.

    deltas: [B, A, 4] and logits: [B, A, C] floating point (16-bit is computed in float32), C >= 2, 0 = background.
    anchors_cxcywh: [A, 4], converted to the precision of the computation.

    The candidates of a class are the boxes with a probability above score_threshold (not equal to it). The best
    max_per_class of them enter suppression: from best to worst, each box that is still there drops all later ones that
    overlap it by iou_threshold or more. Of all classes together, the best max_detections remain. Boxes are not clipped.
    Among equal scores the lower anchor index comes first, then the lower class. An anchor with a logit, a delta or a
    box coordinate that is not finite gives no detection. Deterministic.

    Raises ValueError for a wrong shape, dtype or device, a threshold outside 0 to 1, or a limit below 1.
    Source: rules and defaults of the MLPerf reference. That one fails on an image without candidates; here its count
    is 0.
    """
    _check(deltas, "deltas", (None, None, 4))
    batch_size, num_anchors, _ = deltas.shape
    _check(logits, "logits", (batch_size, num_anchors, None), device=deltas.device)
    _check_num_classes(logits)
    _check(anchors_cxcywh, "anchors_cxcywh", (num_anchors, 4), device=deltas.device)
    _check_fraction(score_threshold, "score_threshold")
    _check_fraction(iou_threshold, "iou_threshold")
    for name, limit in (("max_per_class", max_per_class), ("max_detections", max_detections)):
        if limit < 1:
            raise ValueError(f"{name} = {limit}: expected at least 1")
    dtype = torch.promote_types(torch.promote_types(deltas.dtype, logits.dtype), torch.float32)

    boxes = decode_deltas(deltas.to(dtype), anchors_cxcywh.to(dtype))  # [B, A, 4]
    scores = logits.to(dtype).softmax(dim=-1)[..., 1:]  # [B, A, C - 1]
    finite = torch.stack([values.isfinite().all(dim=-1) for values in (logits, deltas, boxes)]).all(dim=0)  # [B, A]
    candidates = (scores > score_threshold) & finite.unsqueeze(-1)

    detections = Detections(
        boxes_ltrb=boxes.new_zeros(batch_size, max_detections, 4),
        scores=boxes.new_zeros(batch_size, max_detections),
        labels=boxes.new_zeros(batch_size, max_detections, dtype=torch.int32),
        counts=boxes.new_zeros(batch_size, dtype=torch.int32),
    )
    for image in range(batch_size):
        anchors, classes = _choose(
            scores[image], boxes[image], candidates[image], iou_threshold, max_per_class, max_detections
        )
        count = anchors.numel()
        detections.boxes_ltrb[image, :count] = boxes[image, anchors]
        detections.scores[image, :count] = scores[image, anchors, classes]
        detections.labels[image, :count] = (classes + 1).to(torch.int32)
        detections.counts[image] = count
    return detections


def _match(ious: Tensor, by_tie_rank: Tensor, iou_threshold: float) -> Tensor:
    """[A] int64, the ground truth of every anchor or -1, by the rules of `encode_boxes`.

    ious: [G, A]. by_tie_rank: [A] int64, the anchors in the order of their tie ranks.
    """
    best_ious, owners = ious.max(dim=0)
    owners = torch.where(best_ious > iou_threshold, owners, -1)
    best_anchors = by_tie_rank[ious[:, by_tie_rank].argmax(dim=1)]  # [G]; argmax gives the first of equals
    ground_truths = torch.arange(ious.shape[0], device=ious.device)
    forced = torch.full_like(owners, -1).scatter_reduce(0, best_anchors, ground_truths, "amax")
    return torch.where(forced >= 0, forced, owners)


def _choose(
    scores: Tensor,
    boxes_ltrb: Tensor,
    candidates: Tensor,
    iou_threshold: float,
    max_per_class: int,
    max_detections: int,
) -> tuple[Tensor, Tensor]:
    """Anchors and classes [D] int64 of one image's detections, best first, by the rules of `decode_nms`.

    scores: [A, C - 1], without background. boxes_ltrb: [A, 4]. candidates: [A, C - 1] bool. Class 0 is the first one
    after background.
    """
    anchors, classes = candidates.nonzero(as_tuple=True)  # [N] each, in order of anchor, then class
    best_first = scores[anchors, classes].sort(descending=True, stable=True).indices
    anchors, classes = anchors[best_first], classes[best_first]

    ranks = _ranks_within(classes)
    entering = ranks < max_per_class
    anchors, classes, ranks = anchors[entering], classes[entering], ranks[entering]
    kept = _suppress(boxes_ltrb[anchors], classes, ranks, iou_threshold)
    return anchors[kept][:max_detections], classes[kept][:max_detections]


def _ranks_within(classes: Tensor) -> Tensor:
    """[N] int64, the number of entries of the same class before each entry of classes [N]."""
    by_class = classes.sort(stable=True).indices
    counts = classes.bincount()
    first_places = counts.cumsum(0) - counts  # of each class, in the order by_class
    places = torch.arange(classes.numel(), device=classes.device)
    return torch.empty_like(classes).scatter(0, by_class, places - first_places[classes[by_class]])


def _suppress(boxes_ltrb: Tensor, classes: Tensor, ranks: Tensor, iou_threshold: float) -> Tensor:
    """[N] bool, true for boxes_ltrb [N, 4] that survive suppression within their class, in the order of ranks [N].

    All classes advance together, rank by rank: the boxes lie in a table [classes, ranks], padded with empty boxes after
    the last rank of a class.
    """
    if boxes_ltrb.shape[0] == 0:
        return torch.zeros_like(classes, dtype=torch.bool)
    num_ranks = int(ranks.max()) + 1
    table = boxes_ltrb.new_zeros(int(classes.max()) + 1, num_ranks, 4)
    table[classes, ranks] = boxes_ltrb
    overlapping = iou_matrix(table, table) >= iou_threshold
    kept = torch.ones_like(overlapping[..., 0])  # [classes, ranks]
    for rank in range(num_ranks - 1):
        kept[:, rank + 1 :] &= ~(overlapping[:, rank, rank + 1 :] & kept[:, rank, None])
    return kept[classes, ranks]


def _check(
    tensor: Tensor,
    name: str,
    shape: tuple[int | None, ...],
    *,
    kind: str = "floating point",
    device: torch.device | None = None,
) -> None:
    fits = tensor.dim() == len(shape) and all(
        want is None or have == want for have, want in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} has shape {list(tensor.shape)}: expected [{wanted}]")
    integer = tensor.dtype in (torch.int32, torch.int64)
    if (kind == "integer" and not integer) or (kind == "floating point" and not tensor.is_floating_point()):
        raise ValueError(f"{name} is {tensor.dtype}: expected {'int32 or int64' if kind == 'integer' else kind}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}: expected {device}, like the others")


def _check_fraction(value: float, name: str) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} = {value:g}: expected 0 to 1")


def _check_num_classes(logits: Tensor) -> None:
    if logits.shape[-1] < 2:
        raise ValueError(f"logits has shape {list(logits.shape)}: expected at least 2 classes, background and another")


def _check_ground_truths(boxes_ltrb: Tensor, labels: Tensor, offsets: Tensor) -> None:
    _check(boxes_ltrb, "boxes_ltrb", (None, 4))
    if boxes_ltrb.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"boxes_ltrb is {boxes_ltrb.dtype}: expected float32 or float64")
    _check(labels, "labels", (boxes_ltrb.shape[0],), kind="integer", device=boxes_ltrb.device)
    _check(offsets, "offsets", (None,), kind="integer")
    bounds = offsets.tolist()
    if not bounds or bounds[0] != 0 or bounds[-1] != boxes_ltrb.shape[0] or bounds != sorted(bounds):
        raise ValueError(f"offsets = {bounds}: expected an ascending list from 0 to {boxes_ltrb.shape[0]} (boxes)")
    has_area = (boxes_ltrb[:, :2] < boxes_ltrb[:, 2:]).all(dim=1) & boxes_ltrb.isfinite().all(dim=1)
    if not has_area.all():
        row = int((~has_area).nonzero()[0])
        raise ValueError(f"boxes_ltrb[{row}] = {boxes_ltrb[row].tolist()}: expected finite left < right, top < bottom")
    if labels.numel() and int(labels.min()) < 1:
        row = int(labels.argmin())
        raise ValueError(f"labels[{row}] = {int(labels[row])}: expected at least 1")
