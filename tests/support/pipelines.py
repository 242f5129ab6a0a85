"""Shared parts of the tests of the input pipelines: sets of images, loaders with small defaults, pixels of batches."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

import kernels
from dali_pipelines.batch import Augmentation, LabelledImages, TrainBatch
from dali_pipelines.evaluate import EvalLoader
from dali_pipelines.train import TrainLoader
from kernels.boxes import cxcywh_to_ltrb
from kernels.constants import CENTRE_VARIANCE, SIZE_VARIANCE

CPU = torch.device("cpu")
MEAN = np.array([0.485, 0.456, 0.406]) * 255
STD = np.array([0.229, 0.224, 0.225]) * 255
UNCHANGED = Augmentation(
    crop_min_ious=(),
    crop_allow_none=True,
    crop_sides=(0.3, 1.0),
    crop_aspect=(0.5, 2.0),
    crop_attempts=1,
    brightness=(1.0, 1.0),
    contrast=(1.0, 1.0),
    saturation=(1.0, 1.0),
    hue_degrees=0.0,
    flip_probability=0.0,
)
SSD = Augmentation()


def changed(augmentation: Augmentation, **changes: Any) -> Augmentation:
    """A validated copy with other values."""
    return Augmentation(**augmentation.model_dump() | changes)


SSD_CROP = changed(UNCHANGED, crop_min_ious=SSD.crop_min_ious)


def grid_anchors() -> torch.Tensor:
    """[A, 4] cxcywh, squares and rectangles of five sizes on grids."""
    rows = [
        [(cx + 0.5) / cells, (cy + 0.5) / cells, size * stretch, size / stretch]
        for cells, size in ((16, 0.08), (12, 0.16), (8, 0.3), (6, 0.5), (4, 0.8))
        for cy in range(cells)
        for cx in range(cells)
        for stretch in (1.0, 1.6, 1 / 1.6)
    ]
    return torch.tensor(rows).clamp(0, 1)


ANCHORS = grid_anchors()
OWN_ENCODER = partial(kernels.encode_boxes, anchors_cxcywh=ANCHORS)
both_encoders = pytest.mark.parametrize("encode", [None, OWN_ENCODER], ids=["dali", "kernels"])


class Item(NamedTuple):
    """An image of a set: its file, its size and its boxes [G, 5] (ltrb in pixels, label)."""

    name: str
    size_hw: tuple[int, int]
    boxes: list[list[float]]


def image_set(folder: Path, items: list[Item]) -> LabelledImages:
    boxes = np.array([box for item in items for box in item.boxes], dtype=np.float32).reshape(-1, 5)
    return LabelledImages(
        image_dir=folder,
        file_names=tuple(item.name for item in items),
        image_ids=np.arange(len(items), dtype=np.int64) * 7 + 1000,
        sizes_hw=np.array([item.size_hw for item in items], dtype=np.int32),
        boxes_ltrb=boxes[:, :4],
        labels=boxes[:, 4].astype(np.int32),
        offsets=np.cumsum([0] + [len(item.boxes) for item in items], dtype=np.int64),
    )


def train_loader(images: LabelledImages, augmentation: Augmentation = SSD, **changes: Any) -> TrainLoader:
    return TrainLoader(**train_arguments(images, augmentation, **changes))


def train_arguments(images: LabelledImages, augmentation: Augmentation = SSD, **changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "images": images,
        "anchors_ltrb": cxcywh_to_ltrb(ANCHORS).numpy(),
        "variances": (CENTRE_VARIANCE, SIZE_VARIANCE),
        "image_size": 32,
        "batch_size": 4,
        "device": CPU,
        "num_threads": 2,
        "prefetch_batches": 2,
        "seed": 1,
        "augmentation": augmentation,
    }
    return arguments | changes


def eval_loader(images: LabelledImages, **changes: Any) -> EvalLoader:
    arguments: dict[str, Any] = {
        "images": images,
        "image_size": 32,
        "batch_size": 4,
        "device": CPU,
        "num_threads": 2,
        "prefetch_batches": 2,
    }
    return EvalLoader(**(arguments | changes))


def batches(loader: TrainLoader, count: int) -> Iterator[tuple[list[int], TrainBatch]]:
    """Image ids and batch of the next steps, across the ends of epochs."""
    while count:
        for batch in loader.epoch():
            yield loader.last_image_ids.tolist(), batch
            count -= 1
            if not count:
                return


def pixels(images: torch.Tensor) -> np.ndarray:
    """[B, S, S, 3] grey levels of normalised images."""
    return images.permute(0, 2, 3, 1).numpy() * STD + MEAN


def equal(one: TrainBatch, other: TrainBatch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def resized_by_pillow(path: Path, size: int) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR), dtype=np.float64)


def crops_of_ramp(images: torch.Tensor) -> np.ndarray:
    """[B, 4] ltrb fractions of the crop that each output image shows."""
    levels = pixels(images)
    size = levels.shape[1]
    inner = slice(2, size - 2)  # the filter bends the ramp at the border
    red, green = levels[:, :, inner, 0].mean(1), levels[:, inner, :, 1].mean(2)
    centres = (np.arange(size)[inner] + 0.5) / size
    lines = [np.polyfit(centres, values.T, 1) for values in (red, green)]  # slope and value at 0
    (width, left), (height, top) = lines
    return np.stack([left + 0.5, top + 0.5, left + width + 0.5, top + height + 0.5], axis=1) / 256


def odd_image(path: Path) -> None:
    """Saves the image that the file's name asks for."""
    random = np.random.default_rng(3)
    colours = random.integers(0, 256, (8, 12, 3), dtype=np.uint8)
    image = Image.fromarray(colours).resize((96, 64), Image.Resampling.BICUBIC)
    rotated = Image.Exif()
    rotated[0x0112] = 6
    match path.stem:
        case "grey":
            image.convert("L").save(path)
        case "cmyk":
            image.convert("CMYK").save(path)
        case "progressive":
            image.save(path, progressive=True)
        case "palette":
            image.convert("P", palette=Image.Palette.ADAPTIVE).save(path)
        case "alpha":
            image.putalpha(Image.linear_gradient("L").resize(image.size))
            image.save(path)
        case "bilevel":
            image.convert("1").save(path)
        case "rotated":
            image.save(path, exif=rotated)
        case _:
            image.save(path)
