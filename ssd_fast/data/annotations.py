"""The one reader of COCO's instances JSON, for training, for scoring and for class names."""

import codecs
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import msgspec

from ssd_fast.data import dialects
from ssd_fast.data.policy import DataError

T = TypeVar("T")


class Category(NamedTuple):
    """A class: its id in the annotation file and its name."""

    id: int
    name: str


NUMBERED_CATEGORIES = tuple(Category(number, f"class {number}") for number in range(1, 81))
"""As many classes as COCO has, for networks without class names."""


Id = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]


class ImageEntry(msgspec.Struct):
    """An image. file_name is empty, and width and height (pixels) are 0, where the file does not state them."""

    id: Id
    file_name: str = ""
    width: int = 0
    height: int = 0


class Annotation(msgspec.Struct):
    """A box: left, top, width and height in pixels. area is None where the file does not state it.

    A box that is no list of four numbers is four times NaN.
    """

    image_id: Id
    category_id: Id
    bbox: tuple[float, float, float, float]
    area: float | None = None
    iscrowd: int | bool = 0


class CategoryEntry(msgspec.Struct):
    """A class of a file."""

    id: Id
    name: str


class Instances(msgspec.Struct):
    """The content of an annotation file, in its order and with checked types; annotations are none in a test set."""

    images: list[ImageEntry]
    categories: list[CategoryEntry]
    annotations: list[Annotation] = []


def read_instances(annotation_file: Path) -> Instances:
    """The content of a COCO instances file; fields that nothing here needs may be missing or hold anything.

    Numbers may be written in the ways of other programs (ssd_fast/data/dialects.py).
    Raises DataError, naming the file and the place, if it is missing, is not JSON, or is not COCO instances.
    """
    content = read_bytes(annotation_file, "COCO instances")
    try:
        return msgspec.json.decode(content, type=Instances)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):  # RecursionError: lists within lists
        pass
    dialect = parse_json(content, annotation_file, "COCO instances")
    return Instances(
        images=[
            ImageEntry(
                id=dialects.integer(entry, "id"),
                file_name=dialects.text(entry, "file_name", default=""),
                width=dialects.integer(entry, "width", default=0),
                height=dialects.integer(entry, "height", default=0),
            )
            for entry in dialects.entries(dialect, "images", annotation_file)
        ],
        categories=[
            CategoryEntry(dialects.integer(entry, "id"), dialects.text(entry, "name"))
            for entry in dialects.entries(dialect, "categories", annotation_file)
        ],
        annotations=[
            Annotation(
                image_id=dialects.integer(entry, "image_id"),
                category_id=dialects.integer(entry, "category_id"),
                bbox=dialects.box(entry),
                area=dialects.number(entry, "area"),
                iscrowd=dialects.flag(entry, "iscrowd"),
            )
            for entry in dialects.entries(dialect, "annotations", annotation_file, default=True)
        ],
    )


def read_bytes(path: Path, what: str) -> bytes:
    """The bytes of a file, without the mark of UTF-8 that some editors put before them. what: its name in errors.

    Raises DataError, naming the file, if it cannot be read.
    """
    try:
        return path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file: expected {what}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def parse_json(content: bytes, path: Path, what: str) -> Any:
    """Any JSON, also with NaN and Infinity, which Python writes. path, what: names of the file in errors.

    Raises DataError, naming the file, for anything else.
    """
    try:
        return json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON, expected {what}: {error}") from None


def decode_json(path: Path, kind: type[T], what: str) -> T:
    """The content of a JSON file as a type of msgspec. what: its name in errors.

    Raises DataError, naming the file, if it is missing, is not JSON, or holds something else.
    """
    try:
        return msgspec.json.decode(read_bytes(path, what), type=kind)
    except msgspec.ValidationError as error:
        raise DataError(f"{path}: expected {what}: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path}: not JSON, expected {what}: {error}") from None


def read_categories(annotation_file: Path) -> tuple[Category, ...]:
    """The categories of a COCO instances file, in the order of their ids."""
    return select_categories(read_instances(annotation_file), None, annotation_file)


def usable_categories(instances: Instances, annotation_file: Path) -> list[CategoryEntry]:
    """The categories of a file in its order, without a root category that only repeats the name of another.

    Some programs put a category first that stands for the whole set. Where it has the name of a class, the one that
    annotations use is meant, and the later one where none does.
    Raises DataError for no categories at all, ids that repeat, and names of which annotations use several ids.
    """
    found = instances.categories
    if not found:
        raise DataError(f"{annotation_file}: categories is empty: expected at least one")
    by_name: dict[str, list[CategoryEntry]] = {}
    for item in found:
        by_name.setdefault(item.name, []).append(item)
    ids = Counter(item.id for item in found)
    repeated = [id_ for id_, count in ids.items() if count > 1]
    if repeated:
        raise DataError(f"{annotation_file}: categories: expected unique ids, {repeated[0]} occurs more than once")
    if len(by_name) == len(found):
        return found
    used = {annotation.category_id for annotation in instances.annotations}
    kept = []
    for name, items in by_name.items():
        meant = [item for item in items if item.id in used] or items[-1:]
        if len(meant) > 1:
            raise DataError(
                f"{annotation_file}: categories: expected unique names, annotations use {len(meant)} ids of {name!r}"
            )
        kept += meant
    return [item for item in found if item in kept]


def describe_repeated(instances: Instances, kept: Sequence[CategoryEntry]) -> str:
    """What usable_categories has left out, or nothing."""
    left_out = [f"{item.name!r} (id {item.id})" for item in instances.categories if item not in kept]
    return f"categories that repeat the name of another are left out: {', '.join(left_out)}" if left_out else ""


def select_categories(
    instances: Instances, classes: Sequence[str] | None, annotation_file: Path
) -> tuple[Category, ...]:
    """The categories of some class names, in their order; None takes all categories, in the order of their ids.

    Raises DataError as usable_categories does, and for names that the file does not have.
    """
    by_name = {item.name: Category(item.id, item.name) for item in usable_categories(instances, annotation_file)}
    if classes is None:
        return tuple(sorted(by_name.values()))
    unknown = [name for name in classes if name not in by_name]
    if unknown:
        raise DataError(
            f"{annotation_file}: does not have {unknown}, which data.classes names: expected some of {sorted(by_name)}"
        )
    return tuple(by_name[name] for name in classes)
