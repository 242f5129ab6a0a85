"""The types that go into the pipelines and come out of them. Importing this module loads neither DALI nor torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:  # a process that only reads annotations starts without torch
    from torch import Tensor

# Mean and standard deviation of ImageNet's pixels, RGB, as fractions of white: images are normalised with them.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random changes of training images: the crop of SSD, changes of colour, and a flip. The defaults are SSD's.

    Raises ValueError for a value outside its range; the message begins with the field's name.
    """

    crop_min_ious: tuple[float, ...] = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)
    """Options of the crop, each as likely as the others: the IoU, 0 to 1, that the crop has at least with every box it
    keeps. 0 allows any crop."""
    crop_allow_none: bool = True
    """Whether "no crop" is one more option, as likely as each of crop_min_ious."""
    crop_sides: tuple[float, float] = (0.3, 1.0)
    """Range of the crop's width and height, fractions of the image's."""
    crop_aspect: tuple[float, float] = (0.5, 2.0)
    """Range of the crop's width / height, both taken as fractions of the image's; above 0."""
    crop_attempts: int = 1
    """Crops tried before another option is drawn, at least 1. After 1000 options without success (possible only if
    crop_allow_none is false) the best crop found is used; it may hold no box."""
    brightness: tuple[float, float] = (0.875, 1.125)
    """Range of the brightness factor, above 0."""
    contrast: tuple[float, float] = (0.5, 1.5)
    """Range of the contrast factor, above 0."""
    saturation: tuple[float, float] = (0.5, 1.5)
    """Range of the saturation factor, above 0."""
    hue_degrees: float = 18.0
    """Largest rotation of the hue in either direction, degrees, 0 to 180."""
    flip_probability: float = 0.5
    """Probability of a horizontal flip, 0 to 1."""

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raise ValueError if a value lies outside its range."""
        min_ious = self.crop_min_ious
        _require(all(0 <= iou <= 1 for iou in min_ious), f"crop_min_ious = {list(min_ious)}", "values from 0 to 1")
        if not self.crop_allow_none:
            _require(len(min_ious) > 0, "crop_min_ious = [] with crop_allow_none = false", "at least one option")
        for name in ("crop_sides", "crop_aspect", "brightness", "contrast", "saturation"):
            low, high = getattr(self, name)
            found = f"{name} = [{low:g}, {high:g}]"
            _require(low <= high, found, "[low, high] with low <= high")
            if name == "crop_sides":
                _require(low >= 0 and high <= 1, found, "fractions from 0 to 1")
            else:
                _require(low > 0, found, "factors above 0")
        _require(self.crop_attempts >= 1, f"crop_attempts = {self.crop_attempts}", "at least 1")
        _require(0 <= self.hue_degrees <= 180, f"hue_degrees = {self.hue_degrees:g}", "0 to 180")
        _require(0 <= self.flip_probability <= 1, f"flip_probability = {self.flip_probability:g}", "0 to 1")


class LabelledImages(NamedTuple):
    """A validated set of images with their ground truths.

    The ground truths of image n are rows offsets[n] to offsets[n + 1].

    image_dir: folder that file_names are relative to.
    file_names: N names.
    image_ids: [N] int64, the ids of the annotation file.
    sizes_hw: [N, 2] int32, pixels, as stored in the file, without an EXIF rotation.
    boxes_ltrb: [T, 4] float32, pixels, inside the image, left < right and top < bottom.
    labels: [T] int32, 1 to the number of classes.
    offsets: [N + 1] int64.
    """

    image_dir: Path
    file_names: tuple[str, ...]
    image_ids: np.ndarray
    sizes_hw: np.ndarray
    boxes_ltrb: np.ndarray
    labels: np.ndarray
    offsets: np.ndarray


class TrainBatch(NamedTuple):
    """The input of one training step.

    images: [B, 3, S, S], channels_last in memory, normalised; float32 on the CPU, float16 on a GPU.
    deltas: [B, A, 4] float32, regression targets; rows of background anchors are zero.
    labels: [B, A] int32, 0 = background.
    """

    images: Tensor
    deltas: Tensor
    labels: Tensor


class EvalBatch(NamedTuple):
    """Images to detect on. The last batch of a pass may be smaller.

    images: [B, 3, S, S], channels_last in memory, normalised; float32 on the CPU, float16 on a GPU.
    image_ids: [B] int64, on the CPU.
    sizes_hw: [B, 2] int32, on the CPU; pixels of the original image.
    """

    images: Tensor
    image_ids: Tensor
    sizes_hw: Tensor


def _require(holds: bool, found: str, expected: str) -> None:
    if not holds:
        raise ValueError(f"{found}: expected {expected}")
