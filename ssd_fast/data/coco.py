"""COCO-format data sets: read, checked once, and handed on as arrays.

Every problem of annotations or images is found here, before a pipeline is built. Everything that follows relies on
boxes inside their images, known labels and decodable files.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dali_pipelines.batch import LabelledImages
from ssd_fast.data.annotations import Category, Instances, read_instances, select_categories
from ssd_fast.data.boxes import xywh_to_ltrb
from ssd_fast.data.images import inspect_images
from ssd_fast.data.policy import DataError, Policy, apply_policy

SMALLEST_SIDE = 0.1  # pixels: narrower boxes have no area (COCO itself holds a few)


class CocoSet(NamedTuple):
    """A validated data set.

    annotation_file: the file it was read from.
    categories: label k (from 1) is categories[k - 1].
    images: images and ground truths.
    num_left_out_images, num_left_out_boxes: bad ones that the policies left out.
    """

    annotation_file: Path
    categories: tuple[Category, ...]
    images: LabelledImages
    num_left_out_images: int
    num_left_out_boxes: int

    def describe(self) -> str:
        """One line on its contents."""
        images = self.images
        left_out = [
            f"{count} bad {what} left out"
            for count, what in ((self.num_left_out_images, "images"), (self.num_left_out_boxes, "boxes"))
            if count
        ]
        counts = f"{len(images.file_names)} images, {len(images.boxes_ltrb)} boxes, {len(self.categories)} classes"
        return f"{self.annotation_file}: " + "; ".join([counts, *left_out])


class _GroundTruths(NamedTuple):
    """T boxes. owners: [T] int64, positions of their images. labels: [T] int64, from 1. boxes_ltrb: [T, 4], pixels."""

    owners: np.ndarray
    labels: np.ndarray
    boxes_ltrb: np.ndarray


def load_coco(
    annotation_file: Path,
    image_dir: Path,
    *,
    classes: Sequence[str] | None = None,
    with_crowds: bool = False,
    only_annotated: bool = False,
    bad_images: Policy = "error",
    bad_boxes: Policy = "skip",
) -> CocoSet:
    """The images and boxes of a COCO instances file, checked.

    annotation_file: COCO instances JSON. image_dir: folder of its images.
    classes: category names in label order; None takes all categories, in the order of their ids.
    with_crowds: use boxes with iscrowd = 1 as ground truths.
    only_annotated: leave out images without any annotation, as the MLPerf reference does.
    bad_images, bad_boxes: "error" raises at the first; "skip" leaves them out and logs how many and which.
    Raises DataError for a missing or malformed file, ids that repeat or refer to nothing, and an empty set.
    """
    instances = read_instances(annotation_file)
    if only_annotated:
        annotated = {annotation.image_id for annotation in instances.annotations}
        instances.images = [image for image in instances.images if image.id in annotated]
    categories = select_categories(instances, classes, annotation_file)
    image_ids = _unique_image_ids(instances, annotation_file)
    sizes_hw = np.array([(image.height, image.width) for image in instances.images], dtype=np.int32)
    truths = _ground_truths(instances, image_ids, categories, with_crowds, annotation_file)
    boxes, usable = _clip_boxes(truths.boxes_ltrb, sizes_hw[truths.owners])
    bad_box_texts = [
        f"{annotation_file}: image {image_ids[truths.owners[row]]}: box {_box_text(boxes[row])} (left, top, right, "
        f"bottom) has no area inside its image of {sizes_hw[truths.owners[row], 1]} x "
        f"{sizes_hw[truths.owners[row], 0]} pixels"
        for row in np.flatnonzero(~usable)
    ]
    apply_policy(bad_box_texts, bad_boxes, "boxes", "bad_boxes")

    problems = inspect_images([image_dir / image.file_name for image in instances.images], sizes_hw)
    apply_policy([problem for problem in problems if problem], bad_images, "images", "bad_images")
    keep = np.array([problem is None for problem in problems], dtype=bool)
    if not keep.any():
        raise DataError(f"{annotation_file}: none of its {len(keep)} images can be used")
    everything = LabelledImages(
        image_dir=image_dir,
        file_names=tuple(image.file_name for image in instances.images),
        image_ids=image_ids,
        sizes_hw=sizes_hw,
        boxes_ltrb=boxes,
        labels=truths.labels,
        offsets=np.zeros(0, np.int64),
    )
    return CocoSet(
        annotation_file=annotation_file,
        categories=categories,
        images=_select(everything, keep, truths.owners, usable),
        num_left_out_images=int(np.count_nonzero(~keep)),
        num_left_out_boxes=len(bad_box_texts),
    )


def _unique_image_ids(instances: Instances, annotation_file: Path) -> np.ndarray:
    """Ids of the images [N] int64, after a check that they are unique and that each has a file name and a size."""
    if not instances.images:
        raise DataError(f"{annotation_file}: images is empty: expected at least one image")
    for number, image in enumerate(instances.images):
        for key in ("file_name", "width", "height"):
            if not getattr(image, key):
                raise DataError(f"{annotation_file}: images[{number}].{key} is missing, empty or 0: expected a value")
    image_ids = np.array([image.id for image in instances.images], dtype=np.int64)
    unique, counts = np.unique(image_ids, return_counts=True)
    if len(unique) != len(image_ids):
        repeated = unique[counts > 1][0]
        raise DataError(f"{annotation_file}: images: expected unique ids, {repeated} occurs more than once")
    return image_ids


def _ground_truths(
    instances: Instances,
    image_ids: np.ndarray,
    categories: Sequence[Category],
    with_crowds: bool,
    annotation_file: Path,
) -> _GroundTruths:
    """The annotations of the wanted categories, with or without crowds."""
    annotations = instances.annotations
    owner_ids = np.array([item.image_id for item in annotations], dtype=np.int64)
    category_ids = np.array([item.category_id for item in annotations], dtype=np.int64)
    crowd = np.array([item.iscrowd for item in annotations], dtype=bool)
    boxes_xywh = np.array([item.bbox for item in annotations], dtype=np.float64).reshape(-1, 4)

    known_ids = np.array([item.id for item in instances.categories], dtype=np.int64)
    for key, values, known in (("image_id", owner_ids, image_ids), ("category_id", category_ids, known_ids)):
        unknown = np.flatnonzero(~np.isin(values, known))
        if len(unknown):
            raise DataError(
                f"{annotation_file}: annotations[{unknown[0]}].{key} = {values[unknown[0]]}: expected the id of one of "
                f"its {'images' if key == 'image_id' else 'categories'} ({len(unknown)} annotations have such an id)"
            )
    wanted_ids = np.array([category.id for category in categories], dtype=np.int64)
    counts = np.isin(category_ids, wanted_ids)
    if not with_crowds:
        counts &= ~crowd
    by_id = np.argsort(image_ids)
    owners = by_id[np.searchsorted(image_ids, owner_ids[counts], sorter=by_id)]
    by_category = np.argsort(wanted_ids)
    labels = by_category[np.searchsorted(wanted_ids, category_ids[counts], sorter=by_category)] + 1
    return _GroundTruths(owners, labels, xywh_to_ltrb(boxes_xywh[counts]))


def _clip_boxes(boxes_ltrb: np.ndarray, sizes_hw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Boxes cut to their images [T, 4], those without area unchanged, and a mask [T] of those with an area."""
    limits = sizes_hw[:, [1, 0, 1, 0]].astype(np.float64)
    clipped = np.clip(boxes_ltrb, 0, limits)
    sides = clipped[:, 2:] - clipped[:, :2]
    usable = np.isfinite(boxes_ltrb).all(axis=1) & (sides >= SMALLEST_SIDE).all(axis=1)
    return np.where(usable[:, None], clipped, boxes_ltrb), usable


def _select(images: LabelledImages, keep: np.ndarray, owners: np.ndarray, usable: np.ndarray) -> LabelledImages:
    """The images of a mask keep [N], with their usable boxes in the order of the images.

    owners: [T], positions of the images of the boxes. usable: [T], a mask of the boxes.
    """
    usable = usable & keep[owners]
    owners = (np.cumsum(keep) - 1)[owners[usable]]
    order = np.argsort(owners, kind="stable")
    counts = np.bincount(owners, minlength=int(keep.sum()))
    return LabelledImages(
        image_dir=images.image_dir,
        file_names=tuple(name for name, kept in zip(images.file_names, keep, strict=True) if kept),
        image_ids=images.image_ids[keep],
        sizes_hw=images.sizes_hw[keep],
        boxes_ltrb=images.boxes_ltrb[usable][order].astype(np.float32),
        labels=images.labels[usable][order].astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
    )


def _box_text(box: np.ndarray) -> str:
    return "[" + ", ".join(f"{value:g}" for value in box) + "]"
