"""Files and ground truths of training images as graph nodes, in the order that this program decides."""

import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from nvidia.dali import fn, types

from dali_pipelines.batch import LabelledImages
from dali_pipelines.order import TrainingOrder


class Samples(NamedTuple):
    """Graph nodes of one batch of images.

    encoded: the bytes of the image files.
    boxes: ltrb, fractions of the image.
    labels: of the boxes.
    positions: [1] each, place of the image in its set.
    """

    encoded: Any
    boxes: Any
    labels: Any
    positions: Any


class SampleSource:
    """File names and ground truths of batches, for DALI to call.

    DALI counts the batches, and a checkpoint of the pipeline holds the count: this object keeps no position.
    """

    def __init__(self, images: LabelledImages, order: TrainingOrder) -> None:
        self._images = images
        self._order = order
        sizes_wh = images.sizes_hw[:, ::-1].astype(np.float32)
        self._boxes = images.boxes_ltrb / np.repeat(np.tile(sizes_wh, 2), np.diff(images.offsets), axis=0)

    def __call__(self, batch: int) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray], np.ndarray]:
        """Names of the files as bytes, boxes, labels and positions. batch: counts from the first epoch's start."""
        positions = self._order.positions(batch)
        names = [np.frombuffer(os.fsencode(path), np.uint8) for path in self.paths(batch)]
        rows = [slice(*self._images.offsets[position : position + 2]) for position in positions]
        boxes, labels = [self._boxes[row] for row in rows], [self._images.labels[row] for row in rows]
        return names, boxes, labels, positions[:, None]

    def paths(self, batch: int) -> Iterator[str]:
        """The files of a batch. Nothing is computed before the first one is asked for."""
        for position in self._order.positions(batch):
            yield os.path.join(self._images.image_dir, self._images.file_names[position])


def read_samples(source: SampleSource) -> Samples:
    """Graph nodes of the batches of a source, one after another."""
    names, boxes, labels, positions = fn.external_source(
        source=source,
        num_outputs=4,
        dtype=[types.UINT8, types.FLOAT, types.INT32, types.INT64],
        ndim=[1, 2, 1, 1],
    )
    # Mapping the files into memory would not save time: the operator copies what it has mapped.
    return Samples(fn.io.file.read(names, dont_use_mmap=True), boxes, labels, positions)
