"""Training images with their encoded targets: shuffled, sharded, augmented as in SSD, and resumable bit for bit."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from nvidia import dali
from nvidia.dali import Pipeline, fn
from torch import Tensor

from dali_pipelines.augment import Augmented, augmented
from dali_pipelines.batch import Augmentation, LabelledImages, TrainBatch
from dali_pipelines.box_encoder import target_nodes
from dali_pipelines.finish import finished, images_of
from dali_pipelines.loader import as_tensor, make_pipeline, run_ragged
from dali_pipelines.order import TrainingOrder
from dali_pipelines.samples import Samples, SampleSource, read_samples

Encode = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""A function that encodes the ground truths of a batch.

Takes boxes_ltrb [T, 4] float32, labels [T] int32 and offsets [B + 1] int64: those of image b are rows offsets[b] to
offsets[b + 1]. Returns deltas [B, A, 4] and labels [B, A] int32. All tensors are on one device.
"""

_DATA_SET = "data set"
_FORMAT = 3  # of a saved state. 2 was that of a pipeline that resized on the CPU, too; 1 that of DALI's COCO reader


class TrainLoader:
    """This rank's batches, epoch after epoch. Images without a box are left out.

    TrainingOrder decides which images a batch holds. All ranks give the same number of full batches: the last one of an
    epoch is filled with the epoch's first images, with other crops and colours. A set may be smaller than a batch, or
    hold fewer images than there are ranks. Each rank draws its own augmentation.

    anchors_ltrb: [A, 4] float32, fractions of the image; for DALI's encoder.
    variances: divisors of the deltas of a box's centre and size; for DALI's encoder.
    encode: encodes the targets on the device when a batch is taken. None: DALI's encoder does it ahead, in the
        pipeline.
    image_size: width and height of the network's input, pixels.
    batch_size: of this rank.
    prefetch_batches: batches prepared ahead, at least 1.
    hw_decoder_load: share of the images that a GPU's hardware decoder takes.
    state: from `state()` of a loader with equal arguments. This loader continues with the batch that would have
        followed.
    Raises ValueError if the set cannot be trained on, or if the state belongs to another set, seed, batch size, rank,
    encoder, version of DALI, or to a version of this program that ordered images otherwise.
    """

    steps_per_epoch: int
    last_image_ids: np.ndarray
    """[B] int64, image ids of the batch that was given last; empty before the first."""

    def __init__(
        self,
        *,
        images: LabelledImages,
        anchors_ltrb: np.ndarray,
        variances: tuple[float, float],
        image_size: int,
        batch_size: int,
        device: torch.device,
        num_threads: int,
        prefetch_batches: int,
        seed: int,
        augmentation: Augmentation,
        encode: Encode | None = None,
        hw_decoder_load: float = 0.9,
        rank: int = 0,
        world_size: int = 1,
        state: bytes | None = None,
    ) -> None:
        images = _with_boxes(images)
        _check(images, augmentation)
        self._image_ids = images.image_ids
        self._identity = _identity(images, seed, batch_size, rank, world_size, encode)
        self._batches_given, checkpoint = (0, None) if state is None else _unpack(state, self._identity, images)
        order = TrainingOrder(
            len(images.file_names), batch_size=batch_size, rank=rank, world_size=world_size, seed=seed
        )
        self.steps_per_epoch = order.steps_per_epoch
        self.last_image_ids = np.empty(0, np.int64)
        self._source = SampleSource(images, order)
        self._image_size = image_size
        self._device = device
        self._encode = encode
        pipeline = make_pipeline(
            device,
            batch_size=batch_size,
            num_threads=num_threads,
            prefetch_batches=prefetch_batches,
            seed=_derived_seed(seed, 1 + rank),
            checkpointing=True,
            checkpoint=checkpoint,
        )
        with pipeline:
            samples = read_samples(self._source)
            batch = augmented(
                samples, augmentation, image_size=image_size, device=device, hw_decoder_load=hw_decoder_load
            )
            if encode is None:
                targets = target_nodes(batch.boxes, batch.labels, anchors_ltrb, variances, device)
            else:
                targets = _padded(batch.boxes, batch.labels)
            pipeline.set_outputs(*self._outputs(samples, batch, targets))
        pipeline.build()
        self._pipeline: Pipeline | None = pipeline

    def _outputs(self, samples: Samples, batch: Augmented, targets: tuple[Any, Any]) -> tuple[Any, ...]:
        return *batch.pixels, *targets, samples.positions

    def epoch(self) -> Iterator[TrainBatch]:
        """Iterate over the rest of the current epoch; at its end, over the whole next one.

        Raises ImageError for a file that cannot be decoded; the loader cannot be used afterwards.
        """
        assert self._pipeline is not None, "the loader is closed"
        for _ in range(self._batches_given % self.steps_per_epoch, self.steps_per_epoch):
            paths = self._source.paths(self._batches_given)
            *pixels, deltas, labels, positions = run_ragged(self._pipeline, self._device, paths)
            deltas, labels, positions = as_tensor(deltas), as_tensor(labels), as_tensor(positions)
            if self._encode is not None:  # then the pipeline gives boxes in place of deltas
                deltas, labels = self._encode(*_ragged(deltas, labels, self._device))
            self._batches_given += 1
            self.last_image_ids = self._image_ids[positions[:, 0].numpy()]
            images = _finished(pixels, self._image_size).permute(0, 3, 1, 2)
            yield TrainBatch(images=images, deltas=deltas, labels=labels)

    def state(self) -> bytes:
        """Return the position after the batch that was given last; batches prepared beyond it do not count."""
        assert self._pipeline is not None, "the loader is closed"
        header = json.dumps({"format": _FORMAT, **self._identity, "batches given": self._batches_given})
        return header.encode() + b"\n" + self._pipeline.checkpoint()

    def close(self) -> None:
        """End the background threads and free the buffers. Batches that are held elsewhere stay valid."""
        self._pipeline = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class CutInput(TrainLoader):
    """A TrainLoader whose pipeline ends after one of its parts. Its batches serve only to be timed."""

    def __init__(self, until: str, **arguments: Any) -> None:
        """until: one of PIXEL_PARTS. arguments: TrainLoader's."""
        self._until = until
        super().__init__(**arguments)

    def _outputs(self, samples: Samples, batch: Augmented, targets: tuple[Any, Any]) -> tuple[Any, ...]:
        return *batch.until(self._until), *samples[1:]  # DALI warns of a source with outputs that nobody uses

    def run_batch(self) -> None:
        """Make the next batch; on a GPU, queue it on torch's current stream. Raises as `epoch` does."""
        assert self._pipeline is not None, "the loader is closed"
        *pixels, _, _, _ = run_ragged(self._pipeline, self._device, self._source.paths(self._batches_given))
        if len(pixels) > 1:
            _finished(pixels, self._image_size)
        self._batches_given += 1


def _finished(pixels: list[Any], image_size: int) -> Tensor:
    """The network's input [B, S, S, 3] from the outputs of `Augmented.pixels`."""
    if len(pixels) == 1:
        return as_tensor(pixels[0])
    decoded, colours, mirrored = pixels
    return finished(
        images_of(decoded), image_size, colours=as_tensor(colours).numpy(), mirrored=as_tensor(mirrored).bool()
    )


def _padded(boxes: Any, labels: Any) -> tuple[Any, Any]:
    """Graph nodes of tables [G, 4] and [G], where G is the batch's largest number of boxes; unused rows hold 0."""
    return fn.pad(boxes, axes=[0], fill_value=0), fn.pad(labels, fill_value=0)


def _ragged(boxes_ltrb: Tensor, labels: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The arguments of `Encode`, on the device, from padded tables [B, G, 4] and [B, G] on the CPU.

    A box that the crop left without area is dropped: it has no deltas (DALI's encoder would make them infinite).
    """
    kept = (labels > 0) & (boxes_ltrb[..., :2] < boxes_ltrb[..., 2:]).all(dim=-1)
    offsets = F.pad(kept.sum(dim=1).cumsum(dim=0), (1, 0))
    ground_truths = boxes_ltrb[kept], labels[kept], offsets
    if device.type == "cpu":
        return ground_truths
    boxes_ltrb, labels, offsets = (tensor.pin_memory().to(device, non_blocking=True) for tensor in ground_truths)
    return boxes_ltrb, labels, offsets


def _derived_seed(seed: int, stream: int) -> int:
    """A seed of 31 bits. Neighbouring seeds and streams give unrelated ones."""
    return int(np.random.SeedSequence([seed, stream]).generate_state(1)[0] >> 1)


def _with_boxes(images: LabelledImages) -> LabelledImages:
    keep = np.flatnonzero(np.diff(images.offsets))
    return images._replace(
        file_names=tuple(images.file_names[index] for index in keep),
        image_ids=images.image_ids[keep],
        sizes_hw=images.sizes_hw[keep],
        offsets=np.append(images.offsets[keep], images.offsets[-1]),
    )


def _check(images: LabelledImages, augmentation: Augmentation) -> None:
    if not images.file_names:
        raise ValueError(f"{images.image_dir}: no image has a box: expected at least one to train on")
    side = augmentation.crop_sides[0] if augmentation.crop_min_ious else 1.0
    small = np.flatnonzero(images.sizes_hw.min(axis=1) * side < 1)
    if len(small):
        height, width = images.sizes_hw[small[0]]
        raise ValueError(
            f"{images.image_dir / images.file_names[small[0]]}: {width} x {height} pixels: expected larger, so that a "
            f"crop down to {side:g} of a side holds at least one pixel"
        )


def _identity(
    images: LabelledImages, seed: int, batch_size: int, rank: int, world_size: int, encode: Encode | None
) -> dict[str, Any]:
    """The arguments that a saved state must share with the loader that continues from it."""
    data_set = hashlib.sha256(os.fsencode("\0".join(images.file_names)))
    for array in (images.image_ids, images.sizes_hw, images.boxes_ltrb, images.labels, images.offsets):
        data_set.update(array.tobytes())
    return {
        _DATA_SET: data_set.hexdigest(),
        "seed": seed,
        "batch size": batch_size,
        "rank": rank,
        "world size": world_size,
        "box encoder": "dali" if encode is None else "kernels",
        "DALI": dali.__version__,
    }


def _unpack(state: bytes, identity: dict[str, Any], images: LabelledImages) -> tuple[int, bytes]:
    header, separator, checkpoint = state.partition(b"\n")
    try:
        saved = json.loads(header)
    except ValueError:
        saved = None
    if not separator or not isinstance(saved, dict):
        raise ValueError("state of the training input: expected what TrainLoader.state() returns")
    if saved.get("format") != _FORMAT:
        raise ValueError(
            f"state of the training input: format = {saved.get('format', 1)}: expected {_FORMAT}: another version of "
            "this program saved it. Finish the run with that version, or begin a new run with the weights of its "
            "checkpoint"
        )
    if saved.get(_DATA_SET) != identity[_DATA_SET]:
        raise ValueError(
            f"state of the training input: it belongs to other images or boxes than the {len(images.file_names)} of "
            f"{images.image_dir} that have boxes: expected the training set that the run began with"
        )
    for key, value in identity.items():
        if saved.get(key) != value:
            raise ValueError(f"state of the training input: {key} = {saved.get(key)!r}: expected {value!r}")
    return saved["batches given"], checkpoint
