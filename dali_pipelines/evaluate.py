"""Images to detect on, in the order of their list."""

from collections.abc import Iterator

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types

from dali_pipelines.batch import EvalBatch, LabelledImages
from dali_pipelines.loader import decoder_placement, make_pipeline, normalised, resized, run


class EvalLoader:
    """This rank's share of the images: each iteration is a pass that gives each image once.

    images: of all ranks. They are cut into batches, of which rank r takes the numbers r, r + world_size, … (possibly
        none), so that each batch holds the same images as on a single rank. Ground truths are not used.
    image_size: width and height of the network's input, pixels.
    batch_size: of this rank; the last batch of a pass may be smaller.
    prefetch_batches: batches prepared ahead, at least 1.
    apply_orientation: turn images as their EXIF entry says and viewers do; images.sizes_hw must then be those of the
        turned images. False for a data set, whose boxes are in the frame of the stored pixels.
    Iterating raises ImageError for a file that cannot be decoded.
    """

    def __init__(
        self,
        *,
        images: LabelledImages,
        image_size: int,
        batch_size: int,
        device: torch.device,
        num_threads: int,
        prefetch_batches: int,
        rank: int = 0,
        world_size: int = 1,
        apply_orientation: bool = False,
    ) -> None:
        self._image_size = image_size
        self._batch_size = batch_size
        self._device = device
        self._num_threads = num_threads
        self._prefetch_batches = prefetch_batches
        self._apply_orientation = apply_orientation
        num_images = len(images.file_names)
        shard = np.flatnonzero(np.arange(num_images) // batch_size % world_size == rank)
        self._paths = [str(images.image_dir / images.file_names[index]) for index in shard]
        self._image_ids = torch.from_numpy(images.image_ids[shard])
        self._sizes_hw = torch.from_numpy(images.sizes_hw[shard])
        self._idle: Pipeline | None = None

    def __len__(self) -> int:
        """Number of batches of a pass."""
        return -(-len(self._paths) // self._batch_size)

    def __iter__(self) -> Iterator[EvalBatch]:
        if not self._paths:
            return
        # A pass returns its pipeline only at its end, because only then the reader is back at the first image.
        pipeline, self._idle = self._idle or self._build(), None
        for start in range(0, len(self._paths), self._batch_size):
            paths = self._paths[start : start + self._batch_size]
            pixels, indices = (output[: len(paths)] for output in run(pipeline, self._device, paths))
            indices = indices[:, 0].long()
            yield EvalBatch(
                images=pixels.permute(0, 3, 1, 2),
                image_ids=self._image_ids[indices],
                sizes_hw=self._sizes_hw[indices],
            )
        self._idle = pipeline

    def close(self) -> None:
        """End the background threads and free the buffers. The next pass makes new ones."""
        self._idle = None

    def _build(self) -> Pipeline:
        pipeline = make_pipeline(
            self._device,
            batch_size=self._batch_size,
            num_threads=self._num_threads,
            prefetch_batches=self._prefetch_batches,
        )
        with pipeline:
            encoded, indices = fn.readers.file(files=self._paths, pad_last_batch=True)
            pixels = fn.decoders.image(
                encoded,
                device=decoder_placement(self._device),
                output_type=types.RGB,
                adjust_orientation=self._apply_orientation,
            )
            pipeline.set_outputs(normalised(resized(pixels, self._image_size), self._device), indices)
        return pipeline
