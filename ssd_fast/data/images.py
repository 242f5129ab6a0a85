"""Image files of a user: found, and inspected before anything decodes them.

What size an image has and how it is turned is found here alone; DALI, which decodes, is told. Where a header is not
enough to say that a file can be decoded, DALI tries; Pillow only reads the metadata that turn an image.
"""

import glob
import itertools
import logging
import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image, PngImagePlugin

from dali_pipelines.batch import LabelledImages
from ssd_fast.data.headers import FORMATS, Header, read_header
from ssd_fast.data.policy import DataError, Policy, apply_policy

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png")
_OTHER_SUFFIXES = (".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jp2")
_EXIF_ORIENTATION = 0x0112
_FIRST_TRANSPOSED = 5  # orientations from this one on swap width and height
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Pillow's settings, for the whole process: long texts in a PNG must not hide how it is turned, and what is too large is
# decided here.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**26
Image.MAX_IMAGE_PIXELS = None
warnings.filterwarnings("ignore", message="Corrupt EXIF data", category=UserWarning)


class UserImages(NamedTuple):
    """Images to detect on.

    images: without ground truths; image_ids count from 0, sizes_hw are those of the upright images.
    orientations: [N] uint8, how the stored pixels must be turned: EXIF's values, 1 to 8.
    """

    images: LabelledImages
    orientations: np.ndarray


class _Upright(NamedTuple):
    """Size of an upright image, pixels, and how the stored one must be turned, 1 to 8."""

    height: int
    width: int
    orientation: int


def image_problem(path: str, height: int, width: int, max_pixels: float) -> str | None:
    """What is wrong with an image that should have this size, a text that names the file; None for a good one.

    Reads the header and the end of a file, and decodes only in doubt.

    height, width: pixels, as the annotations say. max_pixels: of the largest image that is accepted.
    """
    try:
        found = _check(path, max_pixels)
    except DataError as error:
        return str(error)
    if (found.height, found.width) == (height, width):
        return None
    is_rotated = _orientation_in(path) >= _FIRST_TRANSPOSED
    rotated = " (its EXIF tag rotates it; boxes must refer to the stored pixels)" if is_rotated else ""
    size = f"{found.width} x {found.height} pixels{rotated}"
    return f"{path}: is {size}: expected {width} x {height}, as its annotations say"


def find_images(paths: Iterable[Path], *, bad_images: Policy | None, max_pixels: float = math.inf) -> UserImages:
    """Images to detect on, with the names that the user gave.

    paths: files, folders (all images in them, by file name ending, but no hidden ones), or patterns of files (*, ?, [ ]
    and **).
    Raises DataError for a path that does not exist, a folder without images and, under "error", an unusable image.
    """
    files: list[Path] = []
    for path in itertools.chain.from_iterable(map(_matching, paths)):
        if path.is_dir():
            files += _in_folder(path)
        elif path.exists():
            files.append(path)
        else:
            raise DataError(f"{path}: no such file or folder, and no file matches it as a pattern")
    inspected = _in_threads(partial(_upright_or_problem, max_pixels=max_pixels), files)
    apply_policy([item for item in inspected if isinstance(item, str)], bad_images, "images", "bad_images")
    kept = [(file, item) for file, item in zip(files, inspected, strict=True) if not isinstance(item, str)]
    if not kept:
        raise DataError("no usable image among those given")
    images = LabelledImages(
        image_dir=Path("/"),
        file_names=tuple(os.path.abspath(file) for file, _ in kept),
        image_ids=np.arange(len(kept), dtype=np.int64),
        sizes_hw=np.array([(item.height, item.width) for _, item in kept], dtype=np.int32),
        boxes_ltrb=np.zeros((0, 4), dtype=np.float32),
        labels=np.zeros(0, dtype=np.int32),
        offsets=np.zeros(len(kept) + 1, dtype=np.int64),
    )
    return UserImages(images, np.array([item.orientation for _, item in kept], dtype=np.uint8))


def orientation_of(image: Image.Image) -> int:
    """How an image must be turned, EXIF's values 1 to 8; 1 where its metadata do not say, or cannot be read."""
    try:
        value = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # Pillow raises errors of many kinds on odd metadata
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def turned(image: Image.Image, orientation: int) -> Image.Image:
    """An upright RGB image."""
    return (image.transpose(_TURNS[orientation]) if orientation in _TURNS else image).convert("RGB")


def read_image(path: str, orientation: int | None = 1) -> Image.Image:
    """The pixels of a file that DALI decodes, turned. orientation: EXIF's value; None to look for it.

    Raises DataError that names the file.
    """
    from dali_pipelines.decode import decode_image  # DALI, which reading annotations does without

    try:
        image = Image.fromarray(decode_image(path))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise DataError(str(error)) from None
    return turned(image, _orientation_in(path) if orientation is None else orientation)


def _in_folder(folder: Path) -> list[Path]:
    """The images in a folder, sorted. Raises DataError where there are none."""
    shown = sorted(file for file in folder.iterdir() if not file.name.startswith(".") and not file.is_dir())
    others = Counter(file.suffix.lower() for file in shown if file.suffix.lower() in _OTHER_SUFFIXES)
    if others:
        logger.warning("%s: left out %d files that are no %s: %s", folder, others.total(), FORMATS, dict(others))
    found = [file for file in shown if file.suffix.lower() in IMAGE_SUFFIXES]
    if not found:
        raise DataError(f"{folder}: a folder without images: expected files in {', '.join(IMAGE_SUFFIXES)}")
    return found


def _matching(path: Path) -> list[Path]:
    """The path itself if it exists or matches no file as a pattern; else the files that match, sorted."""
    if path.exists():
        return [path]
    return sorted(file for name in glob.iglob(str(path), recursive=True) if (file := Path(name)).is_file()) or [path]


def _in_threads(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    with ThreadPoolExecutor(max_workers=8) as pool:
        return list(pool.map(function, items))


def _upright_or_problem(path: Path, max_pixels: float) -> _Upright | str:
    try:
        height, width, _ = _check(str(path), max_pixels)
    except DataError as error:
        return str(error)
    orientation = _orientation_in(str(path))
    return _Upright(*((width, height) if orientation >= _FIRST_TRANSPOSED else (height, width)), orientation)


def _check(path: str, max_pixels: float) -> Header:
    """Header of an image that can be decoded. Raises DataError for any other file."""
    header = read_header(path)
    if header.height * header.width > max_pixels:
        raise DataError(
            f"{path}: has {header.width} x {header.height} pixels: expected at most data.max_image_pixels = "
            f"{max_pixels:.0f}"
        )
    if not header.is_sure:
        read_image(path)
    return header


def _orientation_in(path: str) -> int:
    """How the image of a file must be turned, as in orientation_of."""
    try:
        with Image.open(path) as image:
            return orientation_of(image)
    except Exception:  # Pillow does not pass over damaged metadata, as a decoder does
        return 1
