"""Images in memory to detect on: the resize and the normalisation of the evaluation pipeline, without its decoder."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from nvidia.dali import Pipeline, fn
from torch import Tensor

from dali_pipelines.batch import EvalBatch
from dali_pipelines.finish import finished
from dali_pipelines.loader import make_pipeline, normalised, resized, run


class ArrayLoader:
    """Makes batches of decoded images; on a GPU, one pipeline serves all calls.

    image_size: width and height of the network's input, pixels.
    batch_size: the last batch of a call may be smaller.
    """

    def __init__(self, *, image_size: int, batch_size: int, device: torch.device, num_threads: int) -> None:
        self._image_size = image_size
        self._batch_size = batch_size
        self._device = device
        self._pipeline = self._build(num_threads) if device.type == "cuda" else None

    def batches(self, arrays: Sequence[np.ndarray]) -> Iterator[EvalBatch]:
        """Yield the images in their order, with ids that count from 0.

        arrays: uint8 [H, W, 3] RGB each, of any sizes.
        """
        for start in range(0, len(arrays), self._batch_size):
            chosen = [np.ascontiguousarray(array) for array in arrays[start : start + self._batch_size]]
            yield EvalBatch(
                images=self._pixels(chosen).permute(0, 3, 1, 2),
                image_ids=torch.arange(start, start + len(chosen)),
                sizes_hw=torch.tensor([array.shape[:2] for array in chosen], dtype=torch.int32),
            )

    def _pixels(self, arrays: list[np.ndarray]) -> Tensor:
        if self._pipeline is None:
            return finished([torch.tensor(array) for array in arrays], self._image_size)
        self._pipeline.feed_input("pixels", arrays)
        (pixels,) = run(self._pipeline, self._device, ())
        return pixels

    def _build(self, num_threads: int) -> Pipeline:
        pipeline = make_pipeline(self._device, batch_size=self._batch_size, num_threads=num_threads, prefetch_batches=1)
        with pipeline:
            pixels = fn.external_source(name="pixels", layout="HWC").gpu()
            pipeline.set_outputs(normalised(resized(pixels, self._image_size)))
        return pipeline
