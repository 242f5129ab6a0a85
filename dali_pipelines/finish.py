"""From decoded images to the network's input on a CPU: resize, colours, normalisation, mirroring.

DALI does the same on a GPU. On a CPU its resize and its colours take ten times as long as this.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dali_pipelines.batch import IMAGENET_MEAN, IMAGENET_STD
from kernels import resize_normalise

_MEAN, _STD = (255 * np.array(values) for values in (IMAGENET_MEAN, IMAGENET_STD))
_RGB_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])
_YIQ_TO_RGB = np.linalg.inv(_RGB_TO_YIQ)
_GREY = 128  # that contrast pulls towards
_LOW, _HIGH = (torch.from_numpy((level - _MEAN) / _STD).float() for level in (0, 255))
_UNCHANGED = np.array([[1.0, 1.0, 1.0, 0.0]])


def finished(
    images: Sequence[Tensor], image_size: int, *, colours: np.ndarray | None = None, mirrored: Tensor | None = None
) -> Tensor:
    """Normalised images [B, S, S, 3] float32.

    images: B times uint8 [H, W, 3] RGB. mirrored: [B] bool; None for none.
    colours: [B, 4], brightness, contrast, saturation and hue (degrees) of each, as DALI's color_twist takes them; None
        to keep them.
    """
    return resize_normalise(
        images,
        image_size,
        matrices=colour_matrices(np.repeat(_UNCHANGED, len(images), axis=0) if colours is None else colours),
        mirrored=torch.zeros(len(images), dtype=torch.bool) if mirrored is None else mirrored,
        low=_LOW,
        high=_HIGH,
    )


def colour_matrices(colours: np.ndarray) -> Tensor:
    """[B, 3, 4] float32, the matrices of `kernels.resize_normalise` that change colours and normalise."""
    brightness, contrast, saturation, hue = colours.astype(np.float64).T
    chroma = np.zeros((len(colours), 3, 3))
    chroma[:, 0, 0] = 1
    chroma[:, 1, 1] = chroma[:, 2, 2] = saturation * np.cos(np.radians(hue))
    chroma[:, 1, 2] = saturation * np.sin(np.radians(hue))
    chroma[:, 2, 1] = -chroma[:, 1, 2]
    mixed = (brightness * contrast)[:, None, None] * (_YIQ_TO_RGB @ chroma @ _RGB_TO_YIQ)
    constant = np.repeat((brightness * (1 - contrast) * _GREY)[:, None], 3, axis=1)
    matrices = np.concatenate((mixed / _STD[:, None], ((constant - _MEAN) / _STD)[:, :, None]), axis=2)
    return torch.from_numpy(matrices).float()


def images_of(output: Any) -> list[Tensor]:
    """The images of an output of a pipeline on the CPU, over DALI's own memory."""
    return [torch.from_dlpack(output[index]) for index in range(len(output))]
