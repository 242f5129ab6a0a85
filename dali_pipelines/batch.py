"""The data contract between the pipelines and everything that consumes them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:  # reading annotations, in a process of its own, does not wait for torch
    from torch import Tensor


class LabelledImages(NamedTuple):
    """A set of images with their ground truths, validated, as the pipelines read it.

    The ground truths are ragged: those of image n are rows offsets[n] to offsets[n + 1].

    image_dir: folder that file_names are relative to.
    file_names: N names.
    image_ids: [N] int64, the ids of the annotation file.
    sizes_hw: [N, 2] int32, pixels, as stored in the file (an EXIF rotation is not applied).
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
    """One training step's input.

    images: [B, 3, S, S], channels_last in memory, normalised; float32 on the CPU, float16 on a GPU.
    deltas: [B, A, 4] float32, regression targets; rows of background anchors are zero.
    labels: [B, A] int32, 0 = background.
    """

    images: Tensor
    deltas: Tensor
    labels: Tensor


class EvalBatch(NamedTuple):
    """Images to detect on; the last batch of a pass may hold fewer than the others.

    images: [B, 3, S, S], channels_last in memory, normalised; float32 on the CPU, float16 on a GPU.
    image_ids: [B] int64, on the CPU.
    sizes_hw: [B, 2] int32, on the CPU; pixels of the original image.
    """

    images: Tensor
    image_ids: Tensor
    sizes_hw: Tensor
