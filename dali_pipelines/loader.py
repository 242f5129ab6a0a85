"""Parts of both pipelines, training and evaluation: placement, the last operators, and outputs as torch tensors.

On the CPU a pipeline ends with the decoded images, which `finished` makes the network's input, float32. On a GPU the
decoder is "mixed" (host and GPU), all later operators run on the GPU, and images are float16.
"""

import os
import re
from collections.abc import Iterable
from typing import Any

import torch
from nvidia.dali import Pipeline, fn, types
from torch import Tensor

from dali_pipelines.batch import IMAGENET_MEAN, IMAGENET_STD
from dali_pipelines.decode import decode_image

# On the scale of 8-bit pixels.
_MEAN = [255 * value for value in IMAGENET_MEAN]
_STD = [255 * value for value in IMAGENET_STD]


class ImageError(ValueError):
    """An image cannot be read or decoded; the message names its file."""


def make_pipeline(
    device: torch.device,
    *,
    batch_size: int,
    num_threads: int,
    prefetch_batches: int,
    seed: int = 0,
    checkpointing: bool = False,
    checkpoint: bytes | None = None,
) -> Pipeline:
    """Return an empty pipeline on the device, to be filled inside `with pipeline:`.

    The dynamic executor allocates memory for each batch and keeps it as long as the batch is referenced. Any other
    executor would overwrite a batch a few batches later, and `run` would have to copy.
    """
    return Pipeline(
        batch_size=batch_size,
        num_threads=num_threads,
        device_id=_device_index(device) if device.type == "cuda" else None,
        seed=seed,
        prefetch_queue_depth=prefetch_batches,
        exec_dynamic=True,
        enable_checkpointing=checkpointing,
        checkpoint=checkpoint,
    )


def decoder_placement(device: torch.device) -> str:
    """DALI's name for the device of the decoders."""
    return "mixed" if device.type == "cuda" else "cpu"


def resized(images: Any, image_size: int) -> Any:
    """Graph node of images on a GPU, resized to image_size x image_size, uint8 HWC, with a triangular filter."""
    return fn.resize(images, size=[image_size, image_size], antialias=True)


def normalised(images: Any, *, mirror: Any = 0) -> Any:
    """Graph node of normalised images on a GPU, float16 HWC, mirrored where mirror is 1."""
    return fn.crop_mirror_normalize(
        images, mirror=mirror, mean=_MEAN, std=_STD, dtype=types.FLOAT16, output_layout="HWC"
    )


def run(pipeline: Pipeline, device: torch.device, paths: Iterable[str]) -> tuple[Tensor, ...]:
    """Outputs of the next batch as tensors over DALI's own memory, without a copy and without waiting for the GPU.

    On a GPU they are ordered on torch's current stream: work queued there later sees them complete.
    paths: the files that may be in the batch.
    Raises ImageError if one of them cannot be read or decoded; the pipeline cannot be used afterwards.
    """
    return tuple(map(as_tensor, run_ragged(pipeline, device, paths)))


def as_tensor(output: Any) -> Tensor:
    """An output whose samples have one shape, as a tensor over DALI's own memory."""
    return torch.from_dlpack(output.as_tensor())


def run_ragged(pipeline: Pipeline, device: torch.device, paths: Iterable[str]) -> tuple[Any, ...]:
    """Outputs of the next batch as DALI's lists of tensors, which may differ in shape. Raises as `run` does."""
    try:
        return pipeline.run(torch.cuda.current_stream(device) if device.type == "cuda" else None)
    except (RuntimeError, UnicodeDecodeError) as error:
        # DALI copies the name of a file into its message even if it is not UTF-8.
        message = os.fsdecode(error.object) if isinstance(error, UnicodeDecodeError) else str(error)
        if not re.search(r"operator `nvidia\.dali\.fn\.(readers|io\.file|decoders)\.", message):
            raise
        raise ImageError(_explain(message, list(paths))) from None


def _device_index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _explain(message: str, paths: list[str]) -> str:
    reason = message.partition("encountered:")[2].strip().partition("\n")[0]
    reason = re.sub(r'^Assert on ".*?" failed: ', "", reason)
    named = [path for path in paths if path in message]
    path = max(named, key=len) if named else _first_undecodable(paths)
    return f"{path}: cannot be read or decoded as an image (DALI: {reason})"


def _first_undecodable(paths: list[str]) -> str:
    """The first file that cannot be decoded: DALI's error often does not name it."""
    for path in paths:
        try:
            decode_image(path)
        except (OSError, ValueError):
            return path
    return f"one of {len(paths)} files, of which {paths[0]} is the first"
