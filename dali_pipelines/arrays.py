"""Images in memory to detect on: the resize and the normalisation of the evaluation pipeline, without its decoder."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from nvidia.dali import fn

from dali_pipelines.batch import EvalBatch
from dali_pipelines.loader import make_pipeline, normalised, resized, run


class ArrayLoader:
    """Makes batches of decoded images; one pipeline serves all calls.

    image_size: width and height of the network's input, pixels.
    batch_size: the last batch of a call may be smaller.
    """

    def __init__(self, *, image_size: int, batch_size: int, device: torch.device, num_threads: int) -> None:
        self._batch_size = batch_size
        self._device = device
        self._pipeline = make_pipeline(device, batch_size=batch_size, num_threads=num_threads, prefetch_batches=1)
        with self._pipeline:
            pixels = fn.external_source(name="pixels", layout="HWC")
            if device.type == "cuda":
                pixels = pixels.gpu()
            self._pipeline.set_outputs(normalised(resized(pixels, image_size), device))

    def batches(self, arrays: Sequence[np.ndarray]) -> Iterator[EvalBatch]:
        """Yield the images in their order, with ids that count from 0.

        arrays: uint8 [H, W, 3] RGB each, of any sizes.
        """
        for start in range(0, len(arrays), self._batch_size):
            chosen = arrays[start : start + self._batch_size]
            self._pipeline.feed_input("pixels", [np.ascontiguousarray(array) for array in chosen])
            (pixels,) = run(self._pipeline, self._device, ())
            yield EvalBatch(
                images=pixels.permute(0, 3, 1, 2),
                image_ids=torch.arange(start, start + len(chosen)),
                sizes_hw=torch.tensor([array.shape[:2] for array in chosen], dtype=torch.int32),
            )
