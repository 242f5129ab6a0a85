"""Boxes for the tests of the operators: random ones, ones full of ties, and their IoU as a loop over Python numbers."""

import torch
from hypothesis import strategies as st
from torch import Tensor

FLOAT64 = torch.float64

# Corners on a coarse grid of binary fractions: many exact ties, and IoUs that equal a threshold exactly.
grid_boxes = st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(1, 4), st.integers(1, 4)).map(
    lambda box: (box[0] / 8, box[1] / 8, (box[0] + box[2]) / 8, (box[1] + box[3]) / 8)
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def boxes_of(*rows: tuple[float, float, float, float]) -> Tensor:
    """[len(rows), 4] float64."""
    return torch.tensor(rows, dtype=FLOAT64).view(-1, 4)


def random_boxes(count: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """[count, 4] corners in the unit square, sides 0.04 to 0.64."""
    sides = 0.04 + 0.6 * torch.rand(count, 2, generator=generator, dtype=dtype)
    corners = torch.rand(count, 2, generator=generator, dtype=dtype) * (1 - sides)
    return torch.cat((corners, corners + sides), dim=1)


def loop_iou(a: list[float], b: list[float]) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union if union > 0 else 0.0
