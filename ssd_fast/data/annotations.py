"""The one reader of COCO's instances JSON, for training, for scoring and for class names."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec

from ssd_fast.data.policy import DataError

T = TypeVar("T")


class Category(NamedTuple):
    """A class: its id in the annotation file and its name."""

    id: int
    name: str


NUMBERED_CATEGORIES = tuple(Category(number, f"class {number}") for number in range(1, 81))
"""As many classes as COCO has, for networks without class names."""


class ImageEntry(msgspec.Struct):
    """An image. file_name is empty, and width and height (pixels) are 0, where the file does not state them."""

    id: int
    file_name: str = ""
    width: int = 0
    height: int = 0


class Annotation(msgspec.Struct):
    """A box: left, top, width and height in pixels. area is None where the file does not state it."""

    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    area: float | None = None
    iscrowd: int | bool = 0


class _CategoryEntry(msgspec.Struct):
    id: int
    name: str


class Instances(msgspec.Struct):
    """The content of an annotation file, in its order and with checked types."""

    images: list[ImageEntry]
    annotations: list[Annotation]
    categories: list[_CategoryEntry]


def read_instances(annotation_file: Path) -> Instances:
    """The content of a COCO instances file; fields that nothing here needs may be missing or hold anything.

    Raises DataError, naming the file, if it is missing, is not JSON, or is not COCO instances.
    """
    return decode_json(annotation_file, Instances, "COCO instances")


def decode_json(path: Path, kind: type[T], what: str) -> T:
    """The content of a JSON file as a type of msgspec. what: its name in errors.

    Raises DataError, naming the file, if it is missing, is not JSON, or holds something else.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file: expected {what}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except msgspec.ValidationError as error:
        raise DataError(f"{path}: expected {what}: {error}") from None
    except msgspec.DecodeError as error:
        raise DataError(f"{path}: not JSON, expected {what}: {error}") from None


def read_categories(annotation_file: Path) -> tuple[Category, ...]:
    """The categories of a COCO instances file, in the order of their ids."""
    return select_categories(read_instances(annotation_file), None, annotation_file)


def select_categories(
    instances: Instances, classes: Sequence[str] | None, annotation_file: Path
) -> tuple[Category, ...]:
    """The categories of some class names, in their order; None takes all categories, in the order of their ids.

    Raises DataError for ids or names that repeat, no categories at all, and names that the file does not have.
    """
    found = instances.categories
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
