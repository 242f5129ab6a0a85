"""Images that several tests of the pipelines read."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pipelines import Item, image_set

from dali_pipelines.batch import LabelledImages


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> LabelledImages:
    """23 small noise images of different sizes with one to three boxes each; four more have none."""
    folder = tmp_path_factory.mktemp("small")
    random = np.random.default_rng(0)
    items = []
    for number in range(27):
        height, width = (int(side) for side in random.integers(40, 90, 2))
        noise = random.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((width, height)).save(folder / f"{number}.jpg", quality=95)
        corners = random.uniform(0, 0.5, (1 + number % 3, 2)) * [width, height]
        boxes = [[x, y, x + 15, y + 15, 1 + number % 5] for x, y in corners.tolist()] if number % 7 else []
        items.append(Item(f"{number}.jpg", (height, width), boxes))
    return image_set(folder, items)


@pytest.fixture(scope="session")
def ramp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images whose red tells the column and whose green the row, so that they tell where a crop was.

    ramp.jpg has 256 x 256 pixels; small_ramp.jpg has 64 x 64, is cheap to decode, and tells edges to 0.01.
    """
    folder = tmp_path_factory.mktemp("ramp")
    for name, side in (("ramp.jpg", 256), ("small_ramp.jpg", 64)):
        levels = (np.arange(side) + 0.5) * (256 / side) - 0.5
        red, green = np.meshgrid(levels, levels)
        image = Image.fromarray(np.stack([red, green, 0 * red], axis=-1).round().astype(np.uint8))
        image.save(folder / name, quality=98, subsampling=0)
    return folder
