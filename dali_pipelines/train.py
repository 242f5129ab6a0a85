"""Training images with their encoded targets: shuffled, sharded, augmented as in SSD, and resumable to the bit."""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from nvidia import dali
from nvidia.dali import Pipeline, fn, math, types
from torch import Tensor

from dali_pipelines.batch import Augmentation, LabelledImages, TrainBatch
from dali_pipelines.box_encoder import target_nodes
from dali_pipelines.loader import decoder_placement, make_pipeline, normalised, resized, run, run_ragged

# With "no crop" among seven options one image in 10^66 needs more; without it some boxes may allow no crop at all.
_MAX_OPTIONS_DRAWN = 1000

PIXEL_PARTS = ("read", "crop and decode", "resize", "colour, normalise, flip")
_LAST_OF_PIXELS = PIXEL_PARTS[-1]
_PAGE_BYTES = 4096

Encode = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""From the ground truths of a batch, boxes_ltrb [T, 4] float32, labels [T] int32 and offsets [B + 1] int64 (those of
image b are rows offsets[b] to offsets[b + 1]), to deltas [B, A, 4] and labels [B, A] int32; all on one device."""


class TrainLoader:
    """This rank's batches, epoch after epoch; images without a box are left out.

    Every epoch is a new permutation of the whole set, drawn from the seed and the same on all ranks; the ranks' shards
    of it are disjoint and together complete. Augmentation is drawn on each rank by itself. Every rank gives the same
    number of full batches: where its shard ends early, its last image is repeated (in other crops and colours).

    anchors_ltrb: [A, 4] float32, fractions of the image; of DALI's encoder.
    encode: makes the targets, on the device, when a batch is taken; left out, DALI's encoder makes them ahead, in the
        pipeline.
    image_size: width and height of the network's input, pixels.
    batch_size: of this rank.
    prefetch_batches: batches prepared ahead, at least 1.
    hw_decoder_load: share of the images for a GPU's hardware decoder.
    state: from `state()` of a loader with equal arguments; this one goes on with the batch that would have come next.
    Raises ValueError when the set cannot be trained on, or when the state is of another set, seed, batch size,
    rank, encoder or version of DALI.
    """

    steps_per_epoch: int
    last_image_ids: np.ndarray
    """[B] int64, the ids of the batch that was given last; empty before the first."""

    def __init__(
        self,
        *,
        images: LabelledImages,
        anchors_ltrb: np.ndarray,
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
        _check(images, world_size, augmentation)
        self._paths = [str(images.image_dir / name) for name in images.file_names]
        self._image_ids = images.image_ids
        self._identity = {
            "data set": _fingerprint(images),
            "seed": seed,
            "batch size": batch_size,
            "rank": rank,
            "world size": world_size,
            "box encoder": "dali" if encode is None else "kernels",
            "DALI": dali.__version__,
        }
        self.steps_per_epoch = -(-len(images.file_names) // (world_size * batch_size))
        self.last_image_ids = np.empty(0, np.int64)
        self._step, checkpoint = (0, None) if state is None else _unpack(state, self._identity)
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
        with tempfile.TemporaryDirectory(prefix="coco-") as folder:  # read once, while the pipeline is built
            annotations = Path(folder, "instances.json")
            _write_annotations(annotations, images)
            with pipeline:
                encoded, boxes, labels, positions = fn.readers.coco(
                    file_root=str(images.image_dir),
                    annotations_file=str(annotations),
                    image_ids=True,
                    ratio=True,
                    ltrb=True,
                    avoid_class_remapping=True,
                    size_threshold=0.0,
                    shard_id=rank,
                    num_shards=world_size,
                    shuffle_after_epoch=True,
                    shuffle_after_epoch_seed=_derived_seed(seed, 0),
                    pad_last_batch=True,
                )
                parts, boxes, labels = _augmented(
                    encoded, boxes, labels, image_size, augmentation, device, hw_decoder_load
                )
                targets = _padded(boxes, labels) if encode else target_nodes(boxes, labels, anchors_ltrb, device)
                pipeline.set_outputs(*self._outputs(parts, targets, positions))
            pipeline.build()
        self._pipeline: Pipeline | None = pipeline

    def _outputs(self, parts: dict[str, Any], targets: tuple[Any, Any], positions: Any) -> tuple[Any, ...]:
        return parts[_LAST_OF_PIXELS], *targets, positions

    def epoch(self) -> Iterator[TrainBatch]:
        """The rest of the current epoch, or the whole next one where that is at its end.

        Raises ImageError for a file that cannot be decoded; the loader is of no use afterwards.
        """
        assert self._pipeline is not None, "the loader is closed"
        for step in range(self._step, self.steps_per_epoch):
            pixels, deltas, labels, positions = run(self._pipeline, self._device, self._paths)
            if self._encode is not None:  # then the pipeline gives boxes for deltas
                deltas, labels = self._encode(*_ragged(deltas, labels, self._device))
            self._step = (step + 1) % self.steps_per_epoch
            self.last_image_ids = self._image_ids[positions[:, 0].numpy()]
            yield TrainBatch(images=pixels.permute(0, 3, 1, 2), deltas=deltas, labels=labels)

    def state(self) -> bytes:
        """Where the loader stands: after the batch that was given last, whatever has been prepared beyond it."""
        assert self._pipeline is not None, "the loader is closed"
        header = json.dumps(self._identity | {"step": self._step})
        return header.encode() + b"\n" + self._pipeline.checkpoint()

    def close(self) -> None:
        """Ends the background threads and frees the buffers; batches that are held elsewhere stay valid."""
        self._pipeline = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class CutInput(TrainLoader):
    """A TrainLoader whose pipeline ends after one of its parts: its batches are made, and of no use but to be timed."""

    def __init__(self, until: str, **arguments: Any) -> None:
        """until: one of PIXEL_PARTS. arguments: TrainLoader's."""
        self._until = until
        super().__init__(**arguments)

    def _outputs(self, parts: dict[str, Any], targets: tuple[Any, Any], positions: Any) -> tuple[Any, ...]:
        return (parts[self._until],)

    def run_batch(self) -> None:
        """Makes the next batch; on a GPU, queues it on torch's current stream. Raises as `epoch` does."""
        assert self._pipeline is not None, "the loader is closed"
        run_ragged(self._pipeline, self._device, self._paths)


def _augmented(
    encoded: Any,
    boxes: Any,
    labels: Any,
    image_size: int,
    augmentation: Augmentation,
    device: torch.device,
    hw_decoder_load: float,
) -> tuple[dict[str, Any], Any, Any]:
    """Graph nodes of the images after each of PIXEL_PARTS and, on the CPU, of their boxes (ltrb) and labels.

    The last part gives normalised images [S, S, 3]. That of reading is one byte of each page of the files: they are
    mapped into memory, hence read when they are looked at.
    Colours are changed by DALI's one-pass operator, which differs from torchvision's ColorJitter in three ways. The
    order is fixed: hue and saturation, then contrast, then brightness, without clipping in between. Contrast pulls
    towards 128, not towards the image's mean grey. Hue turns the chroma plane of YIQ instead of the hue of HSV, by
    the same angle in the same direction. Brightness and saturation agree to a grey level.
    """
    # Every recipe gives the same operators, so that a state suits it whatever the augmentation was.
    min_ious, sides, aspect = augmentation.crop_min_ious, augmentation.crop_sides, augmentation.crop_aspect
    if not min_ious:
        min_ious, sides, aspect = (0.0,), (1.0, 1.0), (1.0, 1.0)
    corner, extent, boxes, labels = fn.random_bbox_crop(
        math.clamp(boxes, 0.0, 1.0),  # a rounding error beyond the image's edge would end the pipeline
        labels,
        thresholds=list(min_ious),
        allow_no_crop=augmentation.crop_allow_none,
        scaling=list(sides),
        aspect_ratio=list(aspect),
        num_attempts=augmentation.crop_attempts,
        total_num_attempts=_MAX_OPTIONS_DRAWN * augmentation.crop_attempts,
        bbox_layout="xyXY",
        quiet=True,
    )
    decoded = fn.decoders.image_slice(
        encoded,
        corner,
        extent,
        device=decoder_placement(device),
        hw_decoder_load=hw_decoder_load,
        output_type=types.RGB,
        adjust_orientation=False,  # boxes are in the frame of the stored pixels
    )
    shrunk = resized(decoded, image_size)
    pixels = fn.color_twist(
        shrunk,
        brightness=_uniform(*augmentation.brightness),
        contrast=_uniform(*augmentation.contrast),
        saturation=_uniform(*augmentation.saturation),
        hue=_uniform(-augmentation.hue_degrees, augmentation.hue_degrees),
        dtype=types.FLOAT if device.type == "cpu" else types.UINT8,
    )
    if device.type == "cpu":  # there rounding takes longer than the colours, and math.clamp longer than both
        pixels = math.min(math.max(pixels, 0.0), 255.0)
    flip = fn.random.coin_flip(probability=augmentation.flip_probability)
    pixels = normalised(pixels, device, mirror=flip)
    parts = dict(zip(PIXEL_PARTS, (encoded[::_PAGE_BYTES], decoded, shrunk, pixels), strict=True))
    return parts, fn.bb_flip(boxes, ltrb=True, horizontal=flip), labels


def _padded(boxes: Any, labels: Any) -> tuple[Any, Any]:
    """Graph nodes of tables [G, 4] and [G] of the batch's largest number of boxes, with label 0 in unused rows."""
    return fn.pad(boxes, axes=[0], fill_value=0), fn.pad(labels, fill_value=0)


def _ragged(boxes_ltrb: Tensor, labels: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The arguments of `Encode`, on the device, from padded tables [B, G, 4] and [B, G] on the CPU.

    A box that cropping has left without area is dropped: it has no deltas (DALI's encoder would make them infinite).
    """
    kept = (labels > 0) & (boxes_ltrb[..., :2] < boxes_ltrb[..., 2:]).all(dim=-1)
    offsets = F.pad(kept.sum(dim=1).cumsum(dim=0), (1, 0))
    ground_truths = boxes_ltrb[kept], labels[kept], offsets
    if device.type == "cpu":
        return ground_truths
    boxes_ltrb, labels, offsets = (tensor.pin_memory().to(device, non_blocking=True) for tensor in ground_truths)
    return boxes_ltrb, labels, offsets


def _uniform(low: float, high: float) -> Any:
    beyond = np.nextafter(np.float32(high), np.float32(np.inf))  # the range may not be empty
    return fn.random.uniform(range=[low, float(beyond)])


def _derived_seed(seed: int, stream: int) -> int:
    """A seed of 31 bits; neighbouring seeds and streams give unrelated ones."""
    return int(np.random.SeedSequence([seed, stream]).generate_state(1)[0] >> 1)


def _with_boxes(images: LabelledImages) -> LabelledImages:
    keep = np.flatnonzero(np.diff(images.offsets))
    return images._replace(
        file_names=tuple(images.file_names[index] for index in keep),
        image_ids=images.image_ids[keep],
        sizes_hw=images.sizes_hw[keep],
        offsets=np.append(images.offsets[keep], images.offsets[-1]),
    )


def _check(images: LabelledImages, world_size: int, augmentation: Augmentation) -> None:
    if len(images.file_names) < world_size:
        raise ValueError(
            f"{images.image_dir}: {len(images.file_names)} images with boxes: expected at least one for each of "
            f"{world_size} ranks"
        )
    side = augmentation.crop_sides[0] if augmentation.crop_min_ious else 1.0
    small = np.flatnonzero(images.sizes_hw.min(axis=1) * side < 1)
    if len(small):
        height, width = images.sizes_hw[small[0]]
        raise ValueError(
            f"{images.image_dir / images.file_names[small[0]]}: {width} x {height} pixels: expected larger, so that a "
            f"crop down to {side:g} of a side holds at least one pixel"
        )


def _write_annotations(path: Path, images: LabelledImages) -> None:
    """The set as a COCO file for DALI's reader, with positions in the set for image ids.

    Templates, because json.dumps takes twice as long (COCO: 2 s on one core); nine digits keep float32 exact.
    """
    names = [json.dumps(name) for name in images.file_names]
    left, top, right, bottom = images.boxes_ltrb.astype(np.float64).T
    positions = np.repeat(np.arange(len(names)), np.diff(images.offsets)).tolist()
    labels = images.labels.tolist()
    boxes_ltwh = (column.tolist() for column in (left, top, right - left, bottom - top))
    entries = {
        "images": [
            f'{{"id":{position},"file_name":{name},"height":{height},"width":{width}}}'
            for position, (name, (height, width)) in enumerate(zip(names, images.sizes_hw.tolist(), strict=True))
        ],
        "annotations": [
            f'{{"image_id":{position},"category_id":{label},"bbox":[{x:.9g},{y:.9g},{width:.9g},{height:.9g}]}}'
            for position, label, x, y, width, height in zip(positions, labels, *boxes_ltwh, strict=True)
        ],
        "categories": [f'{{"id":{label},"name":"{label}"}}' for label in sorted(set(labels))],
    }
    text = ",\n".join(f'"{key}":[{",".join(rows)}]' for key, rows in entries.items())
    path.write_text("{" + text + "}", encoding="utf-8")


def _fingerprint(images: LabelledImages) -> str:
    digest = hashlib.sha256("\0".join(images.file_names).encode())
    for array in (images.image_ids, images.sizes_hw, images.boxes_ltrb, images.labels, images.offsets):
        digest.update(array.tobytes())
    return digest.hexdigest()


def _unpack(state: bytes, identity: dict[str, Any]) -> tuple[int, bytes]:
    header, separator, checkpoint = state.partition(b"\n")
    try:
        saved = json.loads(header)
    except ValueError:
        saved = None
    if not separator or not isinstance(saved, dict):
        raise ValueError("state of the training input: expected what TrainLoader.state() gives")
    for key, value in identity.items():
        if saved.get(key) != value:
            raise ValueError(f"state of the training input: {key} = {saved.get(key)!r}: expected {value!r}")
    return saved["step"], checkpoint
