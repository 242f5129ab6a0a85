"""The ways in which programs write the numbers of a COCO file, beside COCO's own: 640.0, null, true, NaN, "12.5"."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ssd_fast.data.policy import DataError

Box = tuple[float, float, float, float]
NO_BOX: Box = (math.nan, math.nan, math.nan, math.nan)


class Entry(NamedTuple):
    """An object of a list in a file. place: the file and the position, for errors."""

    values: dict[str, Any]
    place: str

    def error(self, key: str, expected: str) -> DataError:
        """The error of a key that is missing or holds something else."""
        if key not in self.values:
            return DataError(f"{self.place}.{key} is missing: expected {expected}")
        return DataError(f"{self.place}.{key} = {self.values[key]!r:.100}: expected {expected}")


def entries(content: Any, key: str, annotation_file: Path, *, default: bool = False) -> Iterator[Entry]:
    """The objects of a list of the file. default: the list may be missing or null.

    Raises DataError, naming the file, where there is something else.
    """
    if not isinstance(content, dict):
        raise DataError(f"{annotation_file}: expected COCO instances, an object, not {type(content).__name__}")
    found = content.get(key)
    if found is None and default:
        return
    if not isinstance(found, list):
        state = "is missing" if key not in content else f"is {type(found).__name__}"
        raise DataError(f"{annotation_file}: {key} {state}: expected COCO instances, with a list of objects there")
    for number, values in enumerate(found):
        if not isinstance(values, dict):
            raise DataError(f"{annotation_file}: {key}[{number}] = {values!r:.100}: expected an object")
        yield Entry(values, f"{annotation_file}: {key}[{number}]")


def integer(entry: Entry, key: str, default: int | None = None) -> int:
    """A whole number of 64 bits; default: for one that is missing or null."""
    value = entry.values.get(key)
    if value is None and default is not None:
        return default
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not -(2**63) <= value < 2**63:
        raise entry.error(key, "a whole number of at most 64 bits")
    return value


def text(entry: Entry, key: str, default: str | None = None) -> str:
    """A text that can be written as UTF-8; default: for one that is missing or null."""
    value = entry.values.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, str) or any("\ud800" <= character <= "\udfff" for character in value):
        raise entry.error(key, "a text")
    return value


def number(entry: Entry, key: str, expected: str = "a number") -> float | None:
    """A number, also one written as a text; None for one that is missing, null or not finite."""
    value = entry.values.get(key)
    if value is None:
        return None
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        raise entry.error(key, expected) from None
    return found if math.isfinite(found) else None


def flag(entry: Entry, key: str) -> bool:
    """True for 1, 1.0, "1" and true; false for 0, 0.0, "0", false, null, NaN and a key that is missing."""
    value = entry.values.get(key)
    return value if isinstance(value, bool) else bool(number(entry, key, "0 or 1"))


def box(entry: Entry) -> Box:
    """A box, or NO_BOX for what is no list of four numbers."""
    value = entry.values.get("bbox")
    if not isinstance(value, list) or len(value) != 4 or not all(type(side) in (int, float) for side in value):
        return NO_BOX
    try:
        left, top, width, height = map(float, value)
    except OverflowError:
        return NO_BOX
    return left, top, width, height
