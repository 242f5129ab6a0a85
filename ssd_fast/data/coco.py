"""COCO-format data sets: read, checked once, and handed on as arrays.

Everything that can be wrong with annotations or images is found here, before a pipeline is built: what follows may
rely on boxes inside their images, known labels and decodable files.
"""

import glob
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import msgspec
import numpy as np
from PIL import Image, UnidentifiedImageError

from dali_pipelines.batch import LabelledImages

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")
Policy = Literal["error", "skip"]
IMAGE_FORMATS = ("JPEG", "PNG")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
SMALLEST_SIDE = 0.1  # pixels: narrower boxes have no area (COCO itself holds a few)
_JPEG_END = b"\xff\xd9"
_EXIF_ORIENTATION = 0x0112


class DataError(ValueError):
    """Annotations or images that cannot be used; the message names the file and what was expected."""


class Category(NamedTuple):
    """A class: its id in the annotation file and its name."""

    id: int
    name: str


NUMBERED_CATEGORIES = tuple(Category(number, f"class {number}") for number in range(1, 81))
"""As many as COCO has: for networks without names where there are no annotations."""


class CocoSet(NamedTuple):
    """A validated data set.

    annotation_file: where it came from.
    categories: label k (from 1) is categories[k - 1].
    images: images and ground truths.
    num_left_out_images, num_left_out_boxes: what the policies for bad ones left out.
    """

    annotation_file: Path
    categories: tuple[Category, ...]
    images: LabelledImages
    num_left_out_images: int
    num_left_out_boxes: int

    def describe(self) -> str:
        """One line on what it holds."""
        images = self.images
        left_out = [
            f"{count} bad {what} left out"
            for count, what in ((self.num_left_out_images, "images"), (self.num_left_out_boxes, "boxes"))
            if count
        ]
        counts = f"{len(images.file_names)} images, {len(images.boxes_ltrb)} boxes, {len(self.categories)} classes"
        return f"{self.annotation_file}: " + "; ".join([counts, *left_out])


class _Category(msgspec.Struct):
    id: int
    name: str


class _Image(msgspec.Struct):
    id: int
    file_name: str
    width: int
    height: int


class _Annotation(msgspec.Struct):
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    iscrowd: int = 0


class _Instances(msgspec.Struct):
    images: list[_Image]
    annotations: list[_Annotation]
    categories: list[_Category]


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
    with_crowds: whether boxes with iscrowd = 1 count as ground truths.
    only_annotated: whether images without any annotation are left out, as the MLPerf reference does.
    bad_images, bad_boxes: "error" raises at the first; "skip" leaves them out and logs how many and which.
    Raises DataError for a missing or malformed file, ids that repeat or refer to nothing, and an empty set.
    """
    instances = _read_instances(annotation_file)
    if only_annotated:
        annotated = {annotation.image_id for annotation in instances.annotations}
        instances.images = [image for image in instances.images if image.id in annotated]
    categories = _select_categories(instances.categories, classes, annotation_file)
    image_ids = np.array([image.id for image in instances.images], dtype=np.int64)
    if len(image_ids) == 0:
        raise DataError(f"{annotation_file}: images is empty: expected at least one image")
    if len(np.unique(image_ids)) != len(image_ids):
        repeated = _first_repeated(image_ids)
        raise DataError(f"{annotation_file}: images: expected unique ids, {repeated} occurs more than once")
    sizes_hw = np.array([(image.height, image.width) for image in instances.images], dtype=np.int32)

    owners, labels, boxes = _ground_truths(instances, image_ids, categories, with_crowds, annotation_file)
    boxes, usable = _clip_boxes(boxes, sizes_hw[owners])
    bad_box_texts = [
        f"{annotation_file}: image {image_ids[owners[row]]}: box {_box_text(boxes[row])} (left, top, right, bottom) "
        f"has no area inside its image of {sizes_hw[owners[row], 1]} x {sizes_hw[owners[row], 0]} pixels"
        for row in np.flatnonzero(~usable)
    ]
    _apply_policy(bad_box_texts, bad_boxes, "boxes", "bad_boxes")

    file_names = [image.file_name for image in instances.images]
    problems = inspect_images([image_dir / name for name in file_names], sizes_hw)
    _apply_policy([problem for problem in problems if problem], bad_images, "images", "bad_images")
    keep = np.array([problem is None for problem in problems], dtype=bool)
    if not keep.any():
        raise DataError(f"{annotation_file}: none of its {len(keep)} images can be used")

    usable &= keep[owners]
    new_index = np.cumsum(keep) - 1
    owners, labels, boxes = new_index[owners[usable]], labels[usable], boxes[usable]
    order = np.argsort(owners, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(owners, minlength=int(keep.sum())))]).astype(np.int64)
    images = LabelledImages(
        image_dir=image_dir,
        file_names=tuple(name for name, kept in zip(file_names, keep, strict=True) if kept),
        image_ids=image_ids[keep],
        sizes_hw=sizes_hw[keep],
        boxes_ltrb=boxes[order].astype(np.float32),
        labels=labels[order].astype(np.int32),
        offsets=offsets,
    )
    return CocoSet(
        annotation_file=annotation_file,
        categories=categories,
        images=images,
        num_left_out_images=int(np.count_nonzero(~keep)),
        num_left_out_boxes=len(bad_box_texts),
    )


def read_categories(annotation_file: Path) -> tuple[Category, ...]:
    """The categories of a COCO instances file, in the order of their ids."""
    return _select_categories(_read_instances(annotation_file).categories, None, annotation_file)


def find_images(paths: Iterable[Path], *, bad_images: Policy) -> LabelledImages:
    """Images to detect on, without ground truths; image_ids count from 0, sizes_hw are those after EXIF rotation.

    paths: files, folders whose images (by file name ending) are all taken, or patterns of files (*, ?, [ ] and **).
    Raises DataError for a path that is not there, a folder without images and, under "error", an unusable image.
    """
    files: list[Path] = []
    for path in itertools.chain.from_iterable(map(_matching, paths)):
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
            if not found:
                raise DataError(f"{path}: a folder without images: expected files in {', '.join(IMAGE_SUFFIXES)}")
            files += found
        elif path.exists():
            files.append(path)
        else:
            raise DataError(f"{path}: no such file or folder, and no file matches it as a pattern")
    inspected = _in_threads(_inspect_upright, files)
    _apply_policy([item for item in inspected if isinstance(item, str)], bad_images, "images", "bad_images")
    kept = [(file, item) for file, item in zip(files, inspected, strict=True) if not isinstance(item, str)]
    if not kept:
        raise DataError("no usable image among those given")
    return LabelledImages(
        image_dir=Path("/"),
        file_names=tuple(str(file.resolve()) for file, _ in kept),
        image_ids=np.arange(len(kept), dtype=np.int64),
        sizes_hw=np.array([size for _, size in kept], dtype=np.int32),
        boxes_ltrb=np.zeros((0, 4), dtype=np.float32),
        labels=np.zeros(0, dtype=np.int32),
        offsets=np.zeros(len(kept) + 1, dtype=np.int64),
    )


def _matching(path: Path) -> list[Path]:
    """The path itself if it is there, or if no file matches it as a pattern; else those files, by name."""
    if path.exists():
        return [path]
    return sorted(file for name in glob.iglob(str(path), recursive=True) if (file := Path(name)).is_file()) or [path]


def inspect_images(paths: Sequence[Path], sizes_hw: np.ndarray) -> list[str | None]:
    """What is wrong with each image, or None: [N] texts that name the file and what was expected.

    sizes_hw: [N, 2] pixels, what the annotations say. Reads headers and the end of the file; decodes only in doubt.
    """

    def inspect(item: tuple[Path, np.ndarray]) -> str | None:
        path, (height, width) = item
        try:
            stored_hw, orientation = _read_header(path)
        except DataError as error:
            return str(error)
        if stored_hw != (height, width):
            rotated = " (its EXIF tag rotates it; boxes must refer to the stored pixels)" if orientation >= 5 else ""
            found = f"{stored_hw[1]} x {stored_hw[0]} pixels{rotated}"
            return f"{path}: is {found}: expected {width} x {height}, as its annotations say"
        return None

    return _in_threads(inspect, list(zip(paths, sizes_hw, strict=True)))


def _in_threads(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    with ThreadPoolExecutor(max_workers=8) as pool:
        return list(pool.map(function, items))


def _inspect_upright(path: Path) -> tuple[int, int] | str:
    """Height and width after EXIF rotation, or what is wrong."""
    try:
        (height, width), orientation = _read_header(path)
    except DataError as error:
        return str(error)
    return (width, height) if orientation >= 5 else (height, width)


def _read_header(path: Path) -> tuple[tuple[int, int], int]:
    """Stored height and width in pixels and EXIF orientation (1 to 8) of a usable image; else DataError."""
    try:
        with path.open("rb") as file, Image.open(file, formats=IMAGE_FORMATS) as image:
            if image.mode.startswith(("I", "F")):
                raise DataError(f"{path}: has more than 8 bits a channel: expected an 8-bit image")
            orientation = int(image.getexif().get(_EXIF_ORIENTATION, 1))
            size_hw = (image.height, image.width)
            if image.format == "JPEG":
                file.seek(max(0, path.stat().st_size - 4096))
                if _JPEG_END in file.read():  # else it may be cut short, or carry data after its end
                    return size_hw, orientation
            file.seek(0)
            image.load()
            return size_hw, orientation
    except FileNotFoundError:
        raise DataError(f"{path}: no such image") from None
    except UnidentifiedImageError:
        raise DataError(f"{path}: not an image: expected an 8-bit {' or '.join(IMAGE_FORMATS)}") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot be decoded: {error}") from None


def _read_instances(annotation_file: Path) -> _Instances:
    try:
        return msgspec.json.decode(annotation_file.read_bytes(), type=_Instances)
    except FileNotFoundError:
        raise DataError(f"{annotation_file}: no such annotation file") from None
    except OSError as error:
        raise DataError(f"{annotation_file}: cannot be read: {error.strerror}") from None
    except msgspec.ValidationError as error:
        raise DataError(f"{annotation_file}: not COCO instances: {error}") from None
    except msgspec.DecodeError as error:
        raise DataError(f"{annotation_file}: not JSON: {error}") from None


def _select_categories(
    found: Sequence[_Category], classes: Sequence[str] | None, annotation_file: Path
) -> tuple[Category, ...]:
    counts = Counter([("ids", item.id) for item in found] + [("names", item.name) for item in found])
    for (what, value), count in counts.items():
        if count > 1:
            raise DataError(f"{annotation_file}: categories: expected unique {what}, {value!r} occurs more than once")
    if not found:
        raise DataError(f"{annotation_file}: categories is empty: expected at least one")
    if classes is None:
        return tuple(Category(item.id, item.name) for item in sorted(found, key=lambda item: item.id))
    by_name = {item.name: Category(item.id, item.name) for item in found}
    unknown = [name for name in classes if name not in by_name]
    if unknown:
        raise DataError(
            f"{annotation_file}: does not have {unknown}, which data.classes names: expected some of {sorted(by_name)}"
        )
    return tuple(by_name[name] for name in classes)


def _ground_truths(
    instances: _Instances,
    image_ids: np.ndarray,
    categories: Sequence[Category],
    with_crowds: bool,
    annotation_file: Path,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the annotations that count: image index [T] int64, label [T] int64, box [T, 4] float64 ltrb in pixels."""
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
    boxes = boxes_xywh[counts]
    return owners, labels, np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def _clip_boxes(boxes_ltrb: np.ndarray, sizes_hw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Boxes cut to their images [T, 4] (those without area as they were), and which have an area [T] bool."""
    limits = sizes_hw[:, [1, 0, 1, 0]].astype(np.float64)
    clipped = np.clip(boxes_ltrb, 0, limits)
    sides = clipped[:, 2:] - clipped[:, :2]
    usable = np.isfinite(boxes_ltrb).all(axis=1) & (sides >= SMALLEST_SIDE).all(axis=1)
    return np.where(usable[:, None], clipped, boxes_ltrb), usable


def _apply_policy(problems: Sequence[str], policy: Policy, what: str, key: str) -> None:
    if not problems:
        return
    if policy == "error":
        more = f" (and {len(problems) - 1} more {what})" if len(problems) > 1 else ""
        raise DataError(f'{problems[0]}{more}; data.{key} = "skip" would leave such {what} out')
    shown = "".join(f"\n  {problem}" for problem in problems[:5]) + ("\n  …" if len(problems) > 5 else "")
    logger.warning("left out %d %s:%s", len(problems), what, shown)


def _first_repeated(values: np.ndarray) -> int:
    unique, counts = np.unique(values, return_counts=True)
    return int(unique[counts > 1][0])


def _box_text(box: np.ndarray) -> str:
    return "[" + ", ".join(f"{value:g}" for value in box) + "]"
