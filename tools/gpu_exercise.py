"""Call every operator on a device in small, ragged sizes. gpu_check.py runs this under compute-sanitizer."""

import sys

import torch

import kernels
from kernels.boxes import ltrb_to_cxcywh

# images, anchors, classes, type: several tiles, a single anchor, rows that are no multiple of a vector, a row too long
# for a tile
SIZES = (
    (3, 1_301, 81, torch.float16),
    (2, 1, 2, torch.bfloat16),
    (2, 257, 91, torch.float32),
    (1, 33, 4_001, torch.float16),
    (2, 70, 5, torch.float64),
)


def exercise(num_images: int, num_anchors: int, num_classes: int, dtype: torch.dtype, device: torch.device) -> None:
    """Encode boxes, compute the loss and its gradients, and decode, with inputs made on the host."""
    generator = torch.Generator().manual_seed(num_anchors)
    counts = torch.randint(0, 40, (num_images,), generator=generator)
    counts[0] = 300  # more ground truths than fit a tile
    total = int(counts.sum())
    corners = torch.rand(total + num_anchors, 2, generator=generator) * 0.7
    boxes = torch.cat((corners, corners + 0.02 + 0.3 * torch.rand(corners.shape, generator=generator)), dim=-1)
    anchors = ltrb_to_cxcywh(boxes[total:]).to(device)
    labels = torch.randint(1, num_classes, (total,), generator=generator).to(device)
    offsets = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0))).to(device)
    shape = (num_images, num_anchors)
    deltas = torch.randn(*shape, 4, generator=generator).to(dtype).to(device).requires_grad_()
    logits = torch.randn(*shape, num_classes, generator=generator).mul(2).to(dtype).to(device).requires_grad_()

    for tie_ranks in (None, torch.randperm(num_anchors, generator=generator).to(device)):
        targets = kernels.encode_boxes(boxes[:total].to(device), labels, offsets, anchors, tie_ranks=tie_ranks)
    out_of_range = targets.labels * 2**20 - 1
    for labels_of_anchors in (targets.labels, torch.zeros_like(targets.labels), out_of_range):
        box, class_ = kernels.multibox_loss(deltas, logits, targets.deltas, labels_of_anchors)
        (box.sum() + class_.sum()).backward()
    if dtype != torch.float64:
        for score_threshold, limit in ((0.05, 200), (0.0, 200), (0.0, 3), (0.9, 200), (0.05, 5_000)):
            kernels.decode_nms(
                deltas, logits, anchors, score_threshold=score_threshold, max_per_class=limit, max_detections=limit
            )


if __name__ == "__main__":
    for sizes in SIZES:
        exercise(*sizes, torch.device(sys.argv[1]))
    if torch.cuda.is_available():
        torch.cuda.synchronize()
