"""Parts of both pipelines, training and evaluation: placement, the last operators, and outputs as torch tensors.

One definition serves both placements. On the CPU everything runs on the host and images are float32. On a GPU the
decoder is "mixed" (host and GPU), all later operators run on the GPU, and images are float16.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from nvidia.dali import Pipeline, fn, types
from torch import Tensor

from dali_pipelines.batch import IMAGENET_MEAN, IMAGENET_STD

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
    """Graph node of images resized to image_size x image_size, uint8 HWC, with a triangular filter."""
    return fn.resize(images, size=[image_size, image_size], antialias=True)


def normalised(images: Any, device: torch.device, *, mirror: Any = 0) -> Any:
    """Graph node of normalised images, HWC, mirrored where mirror is 1; float32 on the CPU, float16 on a GPU."""
    dtype = types.FLOAT16 if device.type == "cuda" else types.FLOAT
    return fn.crop_mirror_normalize(images, mirror=mirror, mean=_MEAN, std=_STD, dtype=dtype, output_layout="HWC")


def run(pipeline: Pipeline, device: torch.device, paths: Sequence[str]) -> tuple[Tensor, ...]:
    """Outputs of the next batch as tensors over DALI's own memory, without a copy and without waiting for the GPU.

    On a GPU they are ordered on torch's current stream: work queued there later sees them complete.
    paths: the files that may be in the batch.
    Raises ImageError if one of them cannot be read or decoded; the pipeline cannot be used afterwards.
    """
    return tuple(torch.from_dlpack(output.as_tensor()) for output in run_ragged(pipeline, device, paths))


def run_ragged(pipeline: Pipeline, device: torch.device, paths: Sequence[str]) -> tuple[Any, ...]:
    """Outputs of the next batch as DALI's lists of tensors, which may differ in shape. Raises as `run` does."""
    try:
        return pipeline.run(torch.cuda.current_stream(device) if device.type == "cuda" else None)
    except RuntimeError as error:
        message = str(error)
        if not re.search(r"operator `nvidia\.dali\.fn\.(readers|decoders)\.", message):
            raise
        raise ImageError(_explain(message, paths)) from None


def _device_index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _explain(message: str, paths: Sequence[str]) -> str:
    reason = message.partition("encountered:")[2].strip().partition("\n")[0]
    named = re.fullmatch(r"(?:File mapping failed: |Failed to decode sample #\d+ : )(.+)", reason)
    if named:  # the COCO reader gives the decoder names relative to its folder
        path = next((path for path in paths if path.endswith(named[1])), named[1])
    else:
        path = _first_without_header(paths)
    return f"{path}: cannot be read or decoded as an image (DALI: {reason})"


def _first_without_header(paths: Sequence[str]) -> str:
    """The first file without an image header: DALI's error does not name such a file."""
    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=None, exec_pipelined=False, exec_async=False)
    with pipeline:
        encoded, _ = fn.readers.file(files=list(paths))
        pipeline.set_outputs(fn.peek_image_shape(encoded))
    for path in paths:
        try:
            pipeline.run()
        except RuntimeError:
            return path
    return f"one of {len(paths)} files, of which {paths[0]} is the first"
