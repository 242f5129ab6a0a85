"""Image files of a user: found, and inspected before anything decodes them."""

import glob
import itertools
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from dali_pipelines.batch import LabelledImages
from ssd_fast.data.policy import DataError, Policy, apply_policy

Item = TypeVar("Item")
Result = TypeVar("Result")

IMAGE_FORMATS = ("JPEG", "PNG")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
_JPEG_END = b"\xff\xd9"
_JPEG_TAIL_BYTES = 4096
_EXIF_ORIENTATION = 0x0112
_FIRST_TRANSPOSED = 5  # EXIF orientations from this one on swap width and height


class _Header(NamedTuple):
    """Size of an image as stored, pixels, and its EXIF orientation, 1 to 8."""

    height: int
    width: int
    orientation: int

    @property
    def is_transposed(self) -> bool:
        return self.orientation >= _FIRST_TRANSPOSED


def image_problem(path: Path, height: int, width: int) -> str | None:
    """What is wrong with an image that should have this size, a text that names the file; None for a good one.

    height, width: pixels, as the annotations say. Reads the header and the end of a file, and decodes only in doubt.
    """
    try:
        found = _read_header(path)
    except DataError as error:
        return str(error)
    if (found.height, found.width) == (height, width):
        return None
    rotated = " (its EXIF tag rotates it; boxes must refer to the stored pixels)" if found.is_transposed else ""
    size = f"{found.width} x {found.height} pixels{rotated}"
    return f"{path}: is {size}: expected {width} x {height}, as its annotations say"


def find_images(paths: Iterable[Path], *, bad_images: Policy | None) -> LabelledImages:
    """Images to detect on, without ground truths; image_ids count from 0, sizes_hw are those after EXIF rotation.

    paths: files, folders (all images in them, by file name ending), or patterns of files (*, ?, [ ] and **).
    Raises DataError for a path that does not exist, a folder without images and, under "error", an unusable image.
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
    inspected = _in_threads(_upright_size, files)
    apply_policy([item for item in inspected if isinstance(item, str)], bad_images, "images", "bad_images")
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
    """The path itself if it exists or matches no file as a pattern; else the files that match, sorted."""
    if path.exists():
        return [path]
    return sorted(file for name in glob.iglob(str(path), recursive=True) if (file := Path(name)).is_file()) or [path]


def _in_threads(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    with ThreadPoolExecutor(max_workers=8) as pool:
        return list(pool.map(function, items))


def _upright_size(path: Path) -> tuple[int, int] | str:
    """Height and width after EXIF rotation, or the problem of the file."""
    try:
        found = _read_header(path)
    except DataError as error:
        return str(error)
    return (found.width, found.height) if found.is_transposed else (found.height, found.width)


def _read_header(path: Path) -> _Header:
    """Header of a usable image. Raises DataError for any other file."""
    try:
        with path.open("rb") as file, Image.open(file, formats=IMAGE_FORMATS) as image:
            if image.mode.startswith(("I", "F")):
                raise DataError(f"{path}: has more than 8 bits a channel: expected an 8-bit image")
            header = _Header(image.height, image.width, int(image.getexif().get(_EXIF_ORIENTATION, 1)))
            if image.format == "JPEG":
                file.seek(max(0, path.stat().st_size - _JPEG_TAIL_BYTES))
                if _JPEG_END in file.read():  # else it may be cut short, or carry data after its end
                    return header
            file.seek(0)
            image.load()
            return header
    except FileNotFoundError:
        raise DataError(f"{path}: no such image") from None
    except UnidentifiedImageError:
        raise DataError(f"{path}: not an image: expected an 8-bit {' or '.join(IMAGE_FORMATS)}") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot be decoded: {error}") from None
