"""Images to detect on, in the order of their list."""

import os
from collections.abc import Iterator

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types
from torch import Tensor

from dali_pipelines.batch import EvalBatch, LabelledImages
from dali_pipelines.finish import finished, images_of
from dali_pipelines.loader import as_tensor, decoder_placement, make_pipeline, normalised, resized, run_ragged


class EvalLoader:
    """This rank's share of the images: each iteration is a pass that gives each image once.

    images: of all ranks. They are cut into batches, of which rank r takes the numbers r, r + world_size, … (possibly
        none), so that each batch holds the same images as on a single rank. Ground truths are not used.
    image_size: width and height of the network's input, pixels.
    batch_size: of this rank; the last batch of a pass may be smaller.
    prefetch_batches: batches prepared ahead, at least 1.
    orientations: [N] uint8, how each image is turned upright (EXIF's values, 1 to 8); images.sizes_hw must then be
        those of the turned images. None for a data set, whose boxes are in the frame of the stored pixels.
    most_batches: number of batches of the rank that has the most.
    Iterating raises ImageError for a file that cannot be decoded.
    """

    most_batches: int

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
        orientations: np.ndarray | None = None,
    ) -> None:
        self._image_size = image_size
        self._batch_size = batch_size
        self._device = device
        self._num_threads = num_threads
        self._prefetch_batches = prefetch_batches
        num_images = len(images.file_names)
        shard = np.flatnonzero(np.arange(num_images) // batch_size % world_size == rank)
        self._paths = [os.path.join(images.image_dir, images.file_names[index]) for index in shard]
        self.most_batches = -(-num_images // (batch_size * world_size))
        self._image_ids = torch.from_numpy(images.image_ids[shard])
        self._sizes_hw = torch.from_numpy(images.sizes_hw[shard])
        self._orientations = np.ones(len(shard), np.uint8) if orientations is None else orientations[shard]
        self._idle: Pipeline | None = None

    def __len__(self) -> int:
        """Number of batches of a pass."""
        return -(-len(self._paths) // self._batch_size)

    def __iter__(self) -> Iterator[EvalBatch]:
        if not self._paths:
            return
        # A pass returns its pipeline only at its end, because only then the next batch is the first one.
        pipeline, self._idle = self._idle or self._build(), None
        for batch in range(len(self)):
            rows = self._rows(batch)
            (output,) = run_ragged(pipeline, self._device, self._paths[rows])
            on_gpu = self._device.type == "cuda"
            pixels = as_tensor(output) if on_gpu else finished(images_of(output), self._image_size)
            for row, orientation in enumerate(self._orientations[rows].tolist()):
                if orientation != 1:
                    pixels[row] = _turned(pixels[row], orientation).clone()
            yield EvalBatch(
                images=pixels.permute(0, 3, 1, 2), image_ids=self._image_ids[rows], sizes_hw=self._sizes_hw[rows]
            )
        self._idle = pipeline

    def close(self) -> None:
        """End the background threads and free the buffers. The next pass makes new ones."""
        self._idle = None

    def _rows(self, batch: int) -> slice:
        return slice(batch * self._batch_size, (batch + 1) * self._batch_size)

    def _names(self, batch: int) -> list[np.ndarray]:
        """Names of a batch's files as bytes. batch: counts on from pass to pass."""
        paths = self._paths[self._rows(batch % len(self))]
        return [np.frombuffer(os.fsencode(path), np.uint8) for path in paths]

    def _build(self) -> Pipeline:
        pipeline = make_pipeline(
            self._device,
            batch_size=min(self._batch_size, len(self._paths)),
            num_threads=self._num_threads,
            prefetch_batches=min(self._prefetch_batches, len(self)),
        )
        with pipeline:
            names = fn.external_source(source=self._names, dtype=types.UINT8, ndim=1)
            pixels = fn.decoders.image(
                fn.io.file.read(names, dont_use_mmap=True),
                device=decoder_placement(self._device),
                output_type=types.RGB,
                adjust_orientation=False,
            )
            if self._device.type == "cuda":
                pixels = normalised(resized(pixels, self._image_size))
            pipeline.set_outputs(pixels)
        return pipeline


def _turned(pixels: Tensor, orientation: int) -> Tensor:
    """A square image [S, S, C], turned upright. orientation: EXIF's value."""
    flipped = {2: [1], 3: [0, 1], 4: [0], 5: [], 6: [1], 7: [0, 1], 8: [0]}[orientation]
    return (pixels.transpose(0, 1) if orientation >= 5 else pixels).flip(flipped)
