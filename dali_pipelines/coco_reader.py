"""DALI's COCO reader over a set of images that is already validated."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from nvidia.dali import fn

from dali_pipelines.batch import LabelledImages


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


def read_samples(
    images: LabelledImages, annotations: Path, *, rank: int, world_size: int, shuffle_seed: int
) -> Samples:
    """Graph nodes of this rank's images, in a new order each epoch.

    annotations: the `annotation_file` of images.
    shuffle_seed: the same on all ranks, so that their shards are disjoint.
    """
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
        shuffle_after_epoch_seed=shuffle_seed,
        pad_last_batch=True,
    )
    return Samples(encoded, boxes, labels, positions)


@contextmanager
def annotation_file(images: LabelledImages) -> Iterator[Path]:
    """A temporary COCO file of the set, with positions in the set as image ids. DALI reads it once, at the build."""
    with tempfile.TemporaryDirectory(prefix="coco-") as folder:
        path = Path(folder, "instances.json")
        _write_annotations(path, images)
        yield path


def _write_annotations(path: Path, images: LabelledImages) -> None:
    """Write the COCO file from templates: json.dumps takes twice as long (all of COCO: 2 s on one core).

    Nine digits keep float32 exact.
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
