"""The types that go into the pipelines and come out of them. Importing this module loads neither DALI nor torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

if TYPE_CHECKING:  # a process that only reads annotations starts without torch
    from torch import Tensor

# Mean and standard deviation of ImageNet's pixels, RGB, as fractions of white: images are normalised with them.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


Fraction = Annotated[float, Field(ge=0, le=1)]
Range = tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]]


class Augmentation(BaseModel):
    """Random changes of training images: SSD crop, colour changes, flip. It is a section of the recipe."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        validate_default=True,
    )

    crop_min_ious: tuple[Fraction, ...] = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)
    """Options of the crop, drawn with equal chance: every box that is kept overlaps the crop by at least this IoU; 0 is
    no condition."""
    crop_allow_none: bool = True
    """Make "no crop" one more option, as likely as each of crop_min_ious."""
    crop_sides: tuple[Fraction, Fraction] = (0.3, 1.0)
    """Range of the crop's width and height, as fractions of the image's."""
    crop_aspect: Range = (0.5, 2.0)
    """Range of the crop's aspect: width / height, both as fractions of the image's."""
    crop_attempts: Annotated[int, Field(gt=0)] = 1
    """Crops tried for an option before another option is drawn. After 1,000 options without success, which can happen
    only without "no crop", the best crop found is used; it may hold no box."""
    brightness: Range = (0.875, 1.125)
    """Range of the brightness factor."""
    contrast: Range = (0.5, 1.5)
    """Range of the contrast factor."""
    saturation: Range = (0.5, 1.5)
    """Range of the saturation factor."""
    hue_degrees: Annotated[float, Field(ge=0, le=180)] = 18.0
    """Largest rotation of the hue in either direction, degrees."""
    flip_probability: Fraction = 0.5
    """Chance of a horizontal flip."""

    @model_validator(mode="after")
    def _ranges_ascend(self) -> Self:
        for key in ("crop_sides", "crop_aspect", "brightness", "contrast", "saturation"):
            low, high = getattr(self, key)
            if low > high:
                raise ValueError(f"{key} = [{low:g}, {high:g}]: expected [low, high] with low <= high")
        if not self.crop_min_ious and not self.crop_allow_none:
            raise ValueError("crop_min_ious = [] with crop_allow_none = false: expected at least one option")
        return self


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

    def take(self, positions: np.ndarray) -> LabelledImages:
        """The images at these positions, with their ground truths."""
        counts = np.diff(self.offsets)[positions]
        offsets = np.concatenate(([0], counts.cumsum()))
        rows = np.arange(offsets[-1]) + np.repeat(self.offsets[positions] - offsets[:-1], counts)
        return LabelledImages(
            image_dir=self.image_dir,
            file_names=tuple(self.file_names[position] for position in positions),
            image_ids=self.image_ids[positions],
            sizes_hw=self.sizes_hw[positions],
            boxes_ltrb=self.boxes_ltrb[rows],
            labels=self.labels[rows],
            offsets=offsets,
        )


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
