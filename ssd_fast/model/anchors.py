"""Anchors (default boxes), in the order of the heads' NHWC output in memory."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ssd_fast.config.sections import ModelConfig


def make_anchors(
    *,
    image_size: int,
    grid_sizes: Sequence[int],
    steps: Sequence[float],
    scales: Sequence[float],
    aspect_ratios: Sequence[Sequence[float]],
) -> Tensor:
    """Anchors of all levels, ordered by level, row, column, shape.

    image_size: width and height of the network's input, pixels.
    grid_sizes: per level, rows (and columns) of the grid of predictions.
    steps: per level, distance between anchor centres, pixels.
    scales: anchor sizes, pixels; one more than there are levels.
    aspect_ratios: per level, ratios other than 1.
    Returns [A, 4] float32 cxcywh, fractions of the image, each of the four clamped to [0, 1].

    Shapes of a level with scale s, if the next scale is s': a square of side s, one of side sqrt(s s'), and for every
    ratio a the rectangle s sqrt(a) by s / sqrt(a) and its transpose. Computed in float64, rounded once.
    Raises ValueError if a sequence does not have one entry per level (scales: one more).
    Source: Liu et al. 2016, section 2.2, with the steps of the authors' Caffe release.
    """
    levels = len(grid_sizes)
    for name, have, want in (
        ("steps", len(steps), levels),
        ("scales", len(scales), levels + 1),
        ("aspect_ratios", len(aspect_ratios), levels),
    ):
        if have != want:
            raise ValueError(f"{name} has {have} entries: expected {want}, because there are {levels} grid sizes")
    anchors = []
    by_level = zip(grid_sizes, steps, scales[:-1], scales[1:], aspect_ratios, strict=True)
    for grid_size, step, scale, next_scale, ratios in by_level:
        shapes = torch.tensor(_shapes(scale / image_size, next_scale / image_size, ratios), dtype=torch.float64)
        centres = (torch.arange(grid_size, dtype=torch.float64) + 0.5) / (image_size / step)
        grid = (grid_size, grid_size, len(shapes))  # rows, columns, shapes
        cx, cy = centres.view(1, -1, 1).expand(grid), centres.view(-1, 1, 1).expand(grid)
        width, height = shapes[:, 0].expand(grid), shapes[:, 1].expand(grid)
        anchors.append(torch.stack((cx, cy, width, height), dim=-1).reshape(-1, 4))
    return torch.cat(anchors).clamp(0, 1).to(torch.float32)


def model_anchors(config: ModelConfig) -> Tensor:
    """Anchors of a network: row n belongs to row n of its predictions."""
    return make_anchors(
        image_size=config.image_size,
        grid_sizes=config.grid_sizes(),
        steps=config.anchor_steps,
        scales=config.anchor_scales,
        aspect_ratios=config.aspect_ratios,
    )


def reference_order(*, grid_sizes: Sequence[int], anchors_per_cell: Sequence[int]) -> Tensor:
    """Places of our anchors in the order of the MLPerf reference: level, shape, row, column.

    Returns [A] int64, a permutation p: theirs[p] is in our order, and ours[p.argsort()] is in theirs. As tie_ranks of
    `kernels.encode_boxes`, it makes ties fall as in the reference.
    """
    order, first = [], 0
    for grid_size, num_shapes in zip(grid_sizes, anchors_per_cell, strict=True):
        count = num_shapes * grid_size**2
        theirs = torch.arange(first, first + count).view(num_shapes, grid_size, grid_size)
        order.append(theirs.permute(1, 2, 0).flatten())
        first += count
    return torch.cat(order)


def _shapes(scale: float, next_scale: float, ratios: Sequence[float]) -> list[tuple[float, float]]:
    mean = math.sqrt(scale * next_scale)
    shapes = [(scale, scale), (mean, mean)]
    for ratio in ratios:
        long, short = scale * math.sqrt(ratio), scale / math.sqrt(ratio)
        shapes += [(long, short), (short, long)]
    return shapes
