"""Image files of a user: found, and inspected before anything decodes them.

What size an image has and how it is turned is found here alone; DALI, which decodes, is told. The kinds of files that
are accepted give the same pixels in DALI and in Pillow, which draws.
"""

import glob
import itertools
import logging
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from dali_pipelines.batch import LabelledImages
from ssd_fast.data.jpeg import jpeg_size
from ssd_fast.data.policy import DataError, Policy, apply_policy

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

IMAGE_FORMATS = ("JPEG", "PNG")
_FORMATS = " or ".join(IMAGE_FORMATS)
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

# Pillow's settings, for the whole process: texts in a PNG, which nobody reads here, are no reason to refuse it, and
# largest_image decides what is too large.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**26
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class UserImages(NamedTuple):
    """Images to detect on.

    images: without ground truths; image_ids count from 0, sizes_hw are those of the upright images.
    orientations: [N] uint8, how the stored pixels must be turned: EXIF's values, 1 to 8.
    """

    images: LabelledImages
    orientations: np.ndarray


def largest_image() -> float:
    """Pixels of the largest image that is accepted."""
    return 2 * Image.MAX_IMAGE_PIXELS if Image.MAX_IMAGE_PIXELS else np.inf  # Pillow only warns up to twice its limit


def set_largest_image(num_pixels: int) -> None:
    """Refuse larger images in this process (data.max_image_pixels)."""
    Image.MAX_IMAGE_PIXELS = num_pixels // 2


class _Header(NamedTuple):
    """Size of an image as stored, pixels, and its orientation, 1 to 8."""

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


def find_images(paths: Iterable[Path], *, bad_images: Policy | None) -> UserImages:
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
    inspected = _in_threads(_header_or_problem, files)
    apply_policy([item for item in inspected if isinstance(item, str)], bad_images, "images", "bad_images")
    kept = [(file, item) for file, item in zip(files, inspected, strict=True) if not isinstance(item, str)]
    if not kept:
        raise DataError("no usable image among those given")
    sizes_hw = [(h.width, h.height) if h.is_transposed else (h.height, h.width) for _, h in kept]
    images = LabelledImages(
        image_dir=Path("/"),
        file_names=tuple(os.path.abspath(file) for file, _ in kept),
        image_ids=np.arange(len(kept), dtype=np.int64),
        sizes_hw=np.array(sizes_hw, dtype=np.int32),
        boxes_ltrb=np.zeros((0, 4), dtype=np.float32),
        labels=np.zeros(0, dtype=np.int32),
        offsets=np.zeros(len(kept) + 1, dtype=np.int64),
    )
    return UserImages(images, np.array([header.orientation for _, header in kept], dtype=np.uint8))


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


def _in_folder(folder: Path) -> list[Path]:
    """The images in a folder, sorted. Raises DataError where there are none."""
    shown = sorted(file for file in folder.iterdir() if not file.name.startswith(".") and not file.is_dir())
    others = Counter(file.suffix.lower() for file in shown if file.suffix.lower() in _OTHER_SUFFIXES)
    if others:
        logger.warning("%s: left out %d files that are no %s: %s", folder, others.total(), _FORMATS, dict(others))
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


def _header_or_problem(path: Path) -> _Header | str:
    try:
        return _read_header(path)
    except DataError as error:
        return str(error)


def _read_header(path: Path) -> _Header:
    """Header of a usable image. Raises DataError for any other file."""
    try:
        with path.open("rb") as file, Image.open(file, formats=IMAGE_FORMATS) as image:
            if image.mode.startswith(("I", "F")):
                raise DataError(f"{path}: has more than 8 bits a channel: expected an 8-bit image")
            if image.mode == "CMYK" and "adobe" not in image.info:
                raise DataError(f"{path}: a CMYK image without Adobe's marker: expected RGB, grey, or the marker")
            height, width = image.height, image.width
            if jpeg_size(str(path)) is None:  # it may be cut short, or be of a rare kind
                image.load()  # before the orientation: asking for that loads a PNG too, and hides what is wrong with it
            return _Header(height, width, orientation_of(image))
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path}: no such image") from None
    except UnidentifiedImageError:
        raise DataError(f"{path}: not an image: expected an 8-bit {_FORMATS}") from None
    except Image.DecompressionBombError:
        most = largest_image()
        raise DataError(f"{path}: has more than data.max_image_pixels = {most}: expected a smaller image") from None
    except Exception as error:  # Pillow raises errors of many kinds on damaged files
        raise DataError(f"{path}: cannot be decoded: {error}") from None
