"""The augmentation of training images as graph nodes: crop, decode, and on a GPU everything after it."""

from typing import Any, NamedTuple

import numpy as np
import torch
from nvidia.dali import fn, math, types

from dali_pipelines.batch import Augmentation
from dali_pipelines.loader import decoder_placement, normalised, resized
from dali_pipelines.samples import Samples

PIXEL_PARTS = ("read", "crop and decode", "resize, colour, normalise, flip")

# With "no crop" among seven options one image in 10^66 needs more; without it some boxes may allow no crop at all.
_MAX_OPTIONS_DRAWN = 1000


class Augmented(NamedTuple):
    """Graph nodes of one augmented batch.

    encoded: the bytes of the files. decoded: the crops [H, W, 3], 8 bits.
    pixels: on a GPU the network's input, normalised images [S, S, 3]; on a CPU the arguments of `finished`: the crops,
        their colours [4] and 1 where they are mirrored.
    boxes: on the CPU, ltrb fractions of the crop, flipped with the image.
    labels: on the CPU, of the boxes that the crop keeps.
    """

    encoded: Any
    decoded: Any
    pixels: tuple[Any, ...]
    boxes: Any
    labels: Any

    def until(self, part: str) -> tuple[Any, ...]:
        """What there is after one of PIXEL_PARTS."""
        return dict(zip(PIXEL_PARTS, ((self.encoded,), (self.decoded,), self.pixels), strict=True))[part]


def augmented(
    samples: Samples, augmentation: Augmentation, *, image_size: int, device: torch.device, hw_decoder_load: float
) -> Augmented:
    """Graph nodes of the augmented samples.

    Colours are changed in one pass, which differs from torchvision's ColorJitter in three ways. The order is fixed: hue
    and saturation, then contrast, then brightness, without clipping in between. Contrast pulls towards 128 instead of
    the image's mean grey. Hue turns the chroma plane of YIQ instead of the hue of HSV, by the same angle in the same
    direction. Brightness and saturation agree to a grey level.
    """
    corner, extent, boxes, labels = _crop(samples, augmentation)
    decoded = fn.decoders.image_slice(
        samples.encoded,
        corner,
        extent,
        device=decoder_placement(device),
        hw_decoder_load=hw_decoder_load,
        output_type=types.RGB,
        adjust_orientation=False,  # boxes are in the frame of the stored pixels
    )
    colours = {
        "brightness": _uniform(*augmentation.brightness),
        "contrast": _uniform(*augmentation.contrast),
        "saturation": _uniform(*augmentation.saturation),
        "hue": _uniform(-augmentation.hue_degrees, augmentation.hue_degrees),
    }
    flip = fn.random.coin_flip(probability=augmentation.flip_probability)
    pixels: tuple[Any, ...]
    if device.type == "cpu":
        pixels = decoded, fn.stack(*colours.values()), flip
    else:
        pixels = (normalised(fn.color_twist(resized(decoded, image_size), **colours), mirror=flip),)
    return Augmented(samples.encoded, decoded, pixels, fn.bb_flip(boxes, ltrb=True, horizontal=flip), labels)


def _crop(samples: Samples, augmentation: Augmentation) -> tuple[Any, Any, Any, Any]:
    """Corner and extent of the crop, fractions of the image; boxes and labels that it keeps."""
    # Every augmentation gives the same operators, so that a saved state suits any of them.
    min_ious, sides, aspect = augmentation.crop_min_ious, augmentation.crop_sides, augmentation.crop_aspect
    if not min_ious:
        min_ious, sides, aspect = (0.0,), (1.0, 1.0), (1.0, 1.0)
    return fn.random_bbox_crop(
        math.clamp(samples.boxes, 0.0, 1.0),  # a box that rounding moved beyond the image would end the pipeline
        samples.labels,
        thresholds=list(min_ious),
        allow_no_crop=augmentation.crop_allow_none,
        scaling=list(sides),
        aspect_ratio=list(aspect),
        num_attempts=augmentation.crop_attempts,
        total_num_attempts=_MAX_OPTIONS_DRAWN * augmentation.crop_attempts,
        bbox_layout="xyXY",
        quiet=True,
    )


def _uniform(low: float, high: float) -> Any:
    beyond = np.nextafter(np.float32(high), np.float32(np.inf))  # DALI rejects an empty range
    return fn.random.uniform(range=[low, float(beyond)])
