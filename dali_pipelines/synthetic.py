"""Batches from fixed tensors, without disk, decoding or DALI, for profiling and for tests."""

from collections.abc import Iterator
from typing import Self

import torch

from dali_pipelines.batch import EvalBatch, TrainBatch

_POSITIVES_PER_IMAGE = 40  # about what COCO's boxes match among 8,732 anchors


class SyntheticTrainLoader:
    """A `TrainLoader` that repeats one batch, made once on the device.

    Images and the deltas of positive anchors are standard normal; about 40 anchors an image are positive (at most a
    quarter of them), with labels 1 to num_classes.

    num_anchors: A. num_classes: without background.
    """

    def __init__(
        self,
        *,
        num_anchors: int,
        num_classes: int,
        image_size: int,
        batch_size: int,
        device: torch.device,
        steps_per_epoch: int,
        seed: int,
    ) -> None:
        self.steps_per_epoch = steps_per_epoch
        generator = torch.Generator().manual_seed(seed)
        shape = (batch_size, num_anchors)
        positive = torch.rand(shape, generator=generator) < min(_POSITIVES_PER_IMAGE / num_anchors, 0.25)
        labels = torch.randint(1, num_classes + 1, shape, generator=generator, dtype=torch.int32) * positive
        deltas = torch.randn((*shape, 4), generator=generator) * positive[..., None]
        self._batch = TrainBatch(
            images=_random_images(batch_size, image_size, device, generator),
            deltas=deltas.to(device),
            labels=labels.to(device),
        )

    def epoch(self) -> Iterator[TrainBatch]:
        """Iterate over an epoch."""
        for _ in range(self.steps_per_epoch):
            yield self._batch

    def close(self) -> None:
        """Do nothing: there are no threads to end."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class SyntheticEvalLoader:
    """An `EvalLoader` of num_images standard normal images of image_size pixels, with ids from 0.

    Every batch holds the same pixels.
    """

    def __init__(
        self,
        *,
        num_images: int,
        image_size: int,
        batch_size: int,
        device: torch.device,
        seed: int,
    ) -> None:
        self._image_ids = torch.arange(num_images)
        self._image_size = image_size
        self._images = _random_images(batch_size, image_size, device, torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        """Number of batches of a pass."""
        return -(-len(self._image_ids) // len(self._images))

    def __iter__(self) -> Iterator[EvalBatch]:
        for image_ids in self._image_ids.split(len(self._images)):
            yield EvalBatch(
                images=self._images[: len(image_ids)],
                image_ids=image_ids,
                sizes_hw=torch.full((len(image_ids), 2), self._image_size, dtype=torch.int32),
            )

    def close(self) -> None:
        """Do nothing: there are no threads to end."""


def _random_images(batch_size: int, image_size: int, device: torch.device, generator: torch.Generator) -> torch.Tensor:
    """[B, 3, S, S] channels_last; float32 on the CPU, float16 on a GPU."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    pixels = torch.randn((batch_size, image_size, image_size, 3), generator=generator)
    return pixels.to(device, dtype).permute(0, 3, 1, 2)
