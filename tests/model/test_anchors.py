"""Anchors: values, order, and the permutation to the order of the MLPerf reference."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from repository import REPOSITORY

from ssd_fast.config.recipe import load_config
from ssd_fast.model.anchors import make_anchors, model_anchors, reference_order

RECIPE = REPOSITORY / "configs" / "ssd300.toml"
SSD1200: dict[str, Any] = {
    "image_size": 1200,
    "grid_sizes": (50, 25, 13, 7, 3, 3),
    "steps": (24, 48, 1200 / 13, 1200 / 7, 400, 400),
    "scales": (84, 180, 396, 612, 828, 1044, 1260),
    "aspect_ratios": ([2], [2, 3], [2, 3], [2, 3], [2], [2]),
}
grids = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4)


def test_ssd300_has_8732_anchors_and_ssd1200_has_15130() -> None:
    assert model_anchors(load_config(RECIPE).model).shape == (8732, 4)
    assert make_anchors(**SSD1200).shape == (15130, 4)


def test_every_anchor_follows_the_published_rule_in_the_order_level_row_column_shape() -> None:
    config = load_config(RECIPE).model
    expected = []
    for level, grid_size in enumerate((38, 19, 10, 5, 3, 1)):
        small, large = config.anchor_scales[level] / 300, config.anchor_scales[level + 1] / 300
        sides = [(small, small), (math.sqrt(small * large), math.sqrt(small * large))]
        for ratio in config.aspect_ratios[level]:
            sides.append((small * math.sqrt(ratio), small / math.sqrt(ratio)))
            sides.append((small / math.sqrt(ratio), small * math.sqrt(ratio)))
        per_image = 300 / config.anchor_steps[level]
        for row in range(grid_size):
            for column in range(grid_size):
                for width, height in sides:
                    box = ((column + 0.5) / per_image, (row + 0.5) / per_image, width, height)
                    expected.append([min(max(value, 0), 1) for value in box])
    torch.testing.assert_close(model_anchors(config), torch.tensor(expected), rtol=0, atol=6e-8)


def test_first_anchors_of_ssd300_have_the_known_values() -> None:
    anchors = model_anchors(load_config(RECIPE).model)
    cell, scale, next_scale = 8 / 300, 21 / 300, 45 / 300
    assert anchors[0].tolist() == pytest.approx([cell / 2, cell / 2, scale, scale])
    assert anchors[1, 2:].tolist() == pytest.approx([math.sqrt(scale * next_scale)] * 2)
    assert anchors[2, 2:].tolist() == pytest.approx([scale * math.sqrt(2), scale / math.sqrt(2)])
    assert anchors[3, 2:].tolist() == pytest.approx([scale / math.sqrt(2), scale * math.sqrt(2)])
    assert anchors[4, :2].tolist() == pytest.approx([1.5 * cell, 0.5 * cell])  # the next column
    assert anchors[4 * 38, :2].tolist() == pytest.approx([0.5 * cell, 1.5 * cell])  # the next row


def test_centres_and_sizes_beyond_the_image_are_clamped_but_corners_are_not() -> None:
    anchors = model_anchors(load_config(RECIPE).model)
    assert anchors.min() >= 0
    assert anchors.max() == 1
    last_of_level_10 = anchors[5776 + 2166 + 600 - 6 :][:6]  # its centre would be 9.5 x 32 / 300 = 1.0133
    assert last_of_level_10[:, :2].eq(1).all()
    assert (last_of_level_10[:, 0] + last_of_level_10[:, 2] / 2).gt(1).all()
    assert anchors[-2, 2] == 1  # 261 / 300 x sqrt(2)


@settings(deadline=None)
@given(grids)
def test_reference_order_agrees_with_anchors_enumerated_shape_first(levels: list[tuple[int, int]]) -> None:
    ours, theirs = [], []
    for level, (grid_size, shapes) in enumerate(levels):
        cells = [(row, column) for row in range(grid_size) for column in range(grid_size)]
        ours += [(level, shape, cell) for cell in cells for shape in range(shapes)]
        theirs += [(level, shape, cell) for shape in range(shapes) for cell in cells]
    grid_sizes, anchors_per_cell = zip(*levels, strict=True)
    order = reference_order(grid_sizes=grid_sizes, anchors_per_cell=anchors_per_cell)
    assert [theirs[place] for place in order.tolist()] == ours
    assert [ours[place] for place in order.argsort().tolist()] == theirs


@pytest.mark.parametrize("key", ["steps", "scales", "aspect_ratios"])
def test_a_missing_entry_is_named(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key} has"):
        make_anchors(**{**SSD1200, key: SSD1200[key][:-1]})
