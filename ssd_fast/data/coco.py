"""COCO-format data sets: read, checked once, and handed on as arrays.

Every problem of annotations or images is found here, before a pipeline is built. Everything that follows relies on
boxes inside their images, known labels and decodable files.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dali_pipelines.batch import LabelledImages
from ssd_fast.data import cache
from ssd_fast.data.annotations import (
    Category,
    Instances,
    describe_repeated,
    read_instances,
    select_categories,
    usable_categories,
)
from ssd_fast.data.boxes import xywh_to_ltrb
from ssd_fast.data.inspection import inspect_images
from ssd_fast.data.policy import DataError, Policy, apply_policy

if TYPE_CHECKING:  # a process that only reads annotations starts without torch
    from ssd_fast.distributed.world import World

logger = logging.getLogger(__name__)

SMALLEST_SIDE = 0.1  # pixels: narrower boxes have no area (COCO itself holds a few)
_LARGEST = 2**31 - 1  # pixels
_FEW_BOXES, _NEARLY_ALL = 5, 0.95
_LARGE_BYTES = 16 * 2**20  # of an annotation file: smaller ones are read within a second


class CocoSet(NamedTuple):
    """A validated data set.

    annotation_file: the file it was read from.
    categories: label k (from 1) is categories[k - 1].
    images: images and ground truths.
    num_left_out_images, num_left_out_boxes: bad ones that the policies left out.
    truths_digest: what tells its annotations from others, areas and crowds too, by which detections are scored.
    """

    annotation_file: Path
    categories: tuple[Category, ...]
    images: LabelledImages
    num_left_out_images: int
    num_left_out_boxes: int
    truths_digest: str

    def has_boxes_of(self, categories: Sequence[Category]) -> bool:
        """Whether an image has a box of one of these categories, by their names; false for a test set."""
        names = {category.name for category in categories}
        labels = [label for label, category in enumerate(self.categories, start=1) if category.name in names]
        return bool(np.isin(self.images.labels, labels).any())

    def digest(self) -> str:
        """What tells this set from others: its images, annotations and classes."""
        facts = self.categories, self.images.file_names, self.truths_digest
        found = hashlib.sha256(repr(facts).encode(errors="surrogatepass"))
        for array in self.images[2:]:
            found.update(array.tobytes())
        return found.hexdigest()[:16]

    def ids_of(self, categories: Sequence[Category]) -> np.ndarray:
        """As find_ids, in this set."""
        return find_ids(categories, self.categories, self.annotation_file)

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


def find_ids(categories: Sequence[Category], found: Sequence[Category], annotation_file: Path) -> np.ndarray:
    """[K] int64, the ids that a file gives to categories, by their names. found: the categories of the file.

    Raises DataError when the file lacks one.
    """
    ids = {category.name: category.id for category in found}
    missing = [category.name for category in categories if category.name not in ids]
    if missing:
        raise DataError(
            f"{annotation_file}: lacks the categories {missing}: expected all of "
            f"{[category.name for category in categories]}, which the network detects"
        )
    return np.array([ids[category.name] for category in categories], dtype=np.int64)


class ReadSet(NamedTuple):
    """A data set whose images have not been looked at.

    annotation_file, categories: as in CocoSet.
    images: all images, with their usable boxes.
    bad_boxes: a text for each box that cannot be used.
    doubt: what is strange about categories or about all boxes, or nothing.
    truths_digest: as in CocoSet.
    """

    annotation_file: Path
    categories: tuple[Category, ...]
    images: LabelledImages
    bad_boxes: tuple[str, ...]
    doubt: str
    truths_digest: str


class _GroundTruths(NamedTuple):
    """T boxes. rows: [T] int64, places in the file's annotations. owners: [T] int64, positions of their images.

    labels: [T] int64, from 1. boxes_ltrb: [T, 4], pixels.
    """

    rows: np.ndarray
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
    max_pixels: float = math.inf,
    world: World | None = None,
) -> CocoSet:
    """The images and boxes of a COCO instances file, checked.

    Arguments: those of read_set and of check_images.
    """
    found = read_set(
        annotation_file, image_dir, classes=classes, with_crowds=with_crowds, only_annotated=only_annotated
    )
    return check_images(found, bad_images, bad_boxes, max_pixels=max_pixels, world=world)


def read_set(
    annotation_file: Path,
    image_dir: Path,
    *,
    classes: Sequence[str] | None = None,
    with_crowds: bool = False,
    only_annotated: bool = False,
) -> ReadSet:
    """A COCO instances file, read and checked; what was found in a large one is kept for the next time.

    annotation_file: COCO instances JSON. image_dir: folder of its images, none of which is opened.
    classes: category names in label order; None takes all categories, in the order of their ids.
    with_crowds: use boxes with iscrowd = 1 as ground truths.
    only_annotated: leave out images without any annotation, as the MLPerf reference does.
    Raises DataError for a missing or malformed file, ids that repeat or refer to nothing, and an empty set.
    """
    if not is_large(annotation_file):
        return _read(annotation_file, image_dir, classes, with_crowds, only_annotated)
    name = cache.entry_name("set", annotation_file.absolute(), classes, with_crowds, only_annotated)
    status = annotation_file.stat()
    facts = {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
    entry = cache.load_entry(name)
    if entry and (facts.items() <= entry.facts.items() or entry.facts["sha256"] == _digest(annotation_file)):
        return _unpacked(entry, annotation_file, image_dir)
    found = _read(annotation_file, image_dir, classes, with_crowds, only_annotated)
    if len(found.bad_boxes) <= _MOST_KEPT_TEXTS:
        texts: dict[str, Any] = {"categories": found.categories, "file_names": found.images.file_names}
        texts |= {"bad_boxes": found.bad_boxes, "doubt": found.doubt, "truths": found.truths_digest}
        texts["sha256"] = _digest(annotation_file)
        cache.store_entry(name, facts | texts, {key: getattr(found.images, key) for key in _ARRAYS})
    return found


def is_large(annotation_file: Path) -> bool:
    """Whether reading a file takes so long that what was found is kept."""
    return annotation_file.is_file() and annotation_file.stat().st_size >= _LARGE_BYTES


_ARRAYS = ("image_ids", "sizes_hw", "boxes_ltrb", "labels", "offsets")
_MOST_KEPT_TEXTS = 10_000


def _unpacked(entry: cache.Entry, annotation_file: Path, image_dir: Path) -> ReadSet:
    facts, arrays = entry
    images = LabelledImages(image_dir=image_dir, file_names=tuple(facts["file_names"]), **arrays)
    categories = tuple(Category(*category) for category in facts["categories"])
    return ReadSet(annotation_file, categories, images, tuple(facts["bad_boxes"]), facts["doubt"], facts["truths"])


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_images(
    found: ReadSet,
    bad_images: Policy = "error",
    bad_boxes: Policy = "skip",
    *,
    smallest_side: int = 1,
    max_pixels: float = math.inf,
    world: World | None = None,
) -> CocoSet:
    """A set whose images have been looked at, by all ranks together.

    bad_images, bad_boxes: "error" raises at the first; "skip" leaves them out and logs how many and which.
    smallest_side: pixels; an image with a shorter one is bad. max_pixels: so is an image with more.
    world: of the ranks that call this with the same set; None for this process alone.
    Raises DataError under "error", and if no image is left.
    """
    if found.doubt:
        logger.warning("%s: %s", found.annotation_file, found.doubt)
    apply_policy(found.bad_boxes, bad_boxes, "boxes", "bad_boxes")
    problems = inspect_images(found.images, world, max_pixels)
    for row in np.flatnonzero(found.images.sizes_hw.min(axis=1) < smallest_side).tolist():
        height, width = found.images.sizes_hw[row]
        path = found.images.image_dir / found.images.file_names[row]
        problems[row] = f"{path}: {width} x {height} pixels: expected at least {smallest_side} x {smallest_side}"
    apply_policy(list(problems.values()), bad_images, "images", "bad_images")
    num_images = len(found.images.file_names)
    if len(problems) == num_images:
        raise DataError(f"{found.annotation_file}: none of its {num_images} images can be used")
    keep = np.ones(num_images, dtype=bool)
    keep[list(problems)] = False
    return CocoSet(
        annotation_file=found.annotation_file,
        categories=found.categories,
        images=_select(found.images, keep) if problems else found.images,
        num_left_out_images=len(problems),
        num_left_out_boxes=len(found.bad_boxes),
        truths_digest=found.truths_digest,
    )


def _read(
    annotation_file: Path, image_dir: Path, classes: Sequence[str] | None, with_crowds: bool, only_annotated: bool
) -> ReadSet:
    instances = read_instances(annotation_file)
    if only_annotated:
        annotated = {annotation.image_id for annotation in instances.annotations}
        instances.images = [image for image in instances.images if image.id in annotated]
        if not annotated:
            raise DataError(f"{annotation_file}: no image has an annotation: expected some, as only those are wanted")
    categories = select_categories(instances, classes, annotation_file)
    image_ids = _unique_image_ids(instances, annotation_file)
    sizes_hw = np.array([(image.height, image.width) for image in instances.images], dtype=np.int32)
    truths = _ground_truths(instances, image_ids, categories, with_crowds, annotation_file)
    boxes, usable = _clip_boxes(truths.boxes_ltrb, sizes_hw[truths.owners])
    bad_boxes = tuple(
        f"{annotation_file}: annotations[{truths.rows[row]}] of image {image_ids[truths.owners[row]]}: "
        + _describe_bad(boxes[row], sizes_hw[truths.owners[row]])
        for row in np.flatnonzero(~usable)
    )
    owners = truths.owners[usable]
    order = np.argsort(owners, kind="stable")
    counts = np.bincount(owners, minlength=len(image_ids))
    images = LabelledImages(
        image_dir=image_dir,
        file_names=tuple(image.file_name for image in instances.images),
        image_ids=image_ids,
        sizes_hw=sizes_hw,
        boxes_ltrb=boxes[usable][order].astype(np.float32),
        labels=truths.labels[usable][order].astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
    )
    repeated = describe_repeated(instances, usable_categories(instances, annotation_file))
    doubts = repeated, _doubt(truths.boxes_ltrb, sizes_hw[truths.owners])
    text = "; ".join(filter(None, doubts))
    return ReadSet(annotation_file, categories, images, bad_boxes, text, _truths_digest(instances))


def _truths_digest(instances: Instances) -> str:
    """What the annotations hold that scoring reads and LabelledImages do not."""
    annotations = instances.annotations
    areas = np.array([item.area for item in annotations], dtype=np.float64)
    crowds = np.array([item.iscrowd for item in annotations], dtype=bool)
    return hashlib.sha256(areas.tobytes() + crowds.tobytes()).hexdigest()[:16]


def _describe_bad(box_ltrb: np.ndarray, size_hw: np.ndarray) -> str:
    if not np.isfinite(box_ltrb).all():
        return "bbox: expected four finite numbers, [left, top, width, height]"
    text = ", ".join(f"{value:g}" for value in box_ltrb)
    return f"box [{text}] (left, top, right, bottom) has no area inside its image of {size_hw[1]} x {size_hw[0]} pixels"


def _doubt(boxes_ltrb: np.ndarray, sizes_hw: np.ndarray) -> str:
    """What nearly all boxes look like instead of [left, top, width, height] in pixels; empty where they look right."""
    finite = np.isfinite(boxes_ltrb).all(axis=1)
    boxes, limits = boxes_ltrb[finite], sizes_hw[finite][:, ::-1] + 1
    if len(boxes) < _FEW_BOXES:
        return ""
    sides = boxes[:, 2:] - boxes[:, :2]  # as the file states them
    if np.mean((boxes[:, 2:] <= 2).all(axis=1)) > _NEARLY_ALL:
        return "nearly all boxes lie within the first two pixels: bbox looks like fractions of the image, not pixels"
    as_corners = (sides > boxes[:, :2]).all(axis=1) & (sides <= limits).all(axis=1)
    leaves = (boxes[:, 2:] > limits).any(axis=1)
    if np.mean(as_corners) > _NEARLY_ALL and np.mean(leaves) > 0.5:
        return "most boxes leave their image: bbox looks like two corners, not [left, top, width, height]"
    return ""


def _unique_image_ids(instances: Instances, annotation_file: Path) -> np.ndarray:
    """Ids of the images [N] int64, after a check that they are unique and that each has a file name and a size."""
    if not instances.images:
        raise DataError(f"{annotation_file}: images is empty: expected at least one image")
    for number, image in enumerate(instances.images):
        for key in ("file_name", "width", "height"):
            if not getattr(image, key):
                raise DataError(f"{annotation_file}: images[{number}].{key} is missing, empty or 0: expected a value")
        if "\0" in image.file_name or min(image.width, image.height) < 0 or max(image.width, image.height) > _LARGEST:
            raise DataError(
                f"{annotation_file}: images[{number}]: {image.file_name!r}, {image.width} x {image.height} pixels: "
                f"expected the name of a file and sides of 1 to {_LARGEST} pixels"
            )
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
    with np.errstate(over="ignore"):  # a box that ends beyond all numbers is a bad one
        boxes_ltrb = xywh_to_ltrb(boxes_xywh)

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
    return _GroundTruths(np.flatnonzero(counts), owners, labels, boxes_ltrb[counts])


def _clip_boxes(boxes_ltrb: np.ndarray, sizes_hw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Boxes cut to their images [T, 4], those without area unchanged, and a mask [T] of those with an area."""
    limits = sizes_hw[:, [1, 0, 1, 0]].astype(np.float64)
    clipped = np.clip(boxes_ltrb, 0, limits)
    sides = clipped[:, 2:] - clipped[:, :2]
    usable = np.isfinite(boxes_ltrb).all(axis=1) & (sides >= SMALLEST_SIDE).all(axis=1)
    return np.where(usable[:, None], clipped, boxes_ltrb), usable


def _select(images: LabelledImages, keep: np.ndarray) -> LabelledImages:
    """The images of a mask [N], with their boxes."""
    counts = np.diff(images.offsets)
    boxes = np.repeat(keep, counts)
    return LabelledImages(
        image_dir=images.image_dir,
        file_names=tuple(name for name, kept in zip(images.file_names, keep, strict=True) if kept),
        image_ids=images.image_ids[keep],
        sizes_hw=images.sizes_hw[keep],
        boxes_ltrb=images.boxes_ltrb[boxes],
        labels=images.labels[boxes],
        offsets=np.concatenate([[0], np.cumsum(counts[keep])]).astype(np.int64),
    )
