"""JPEG files that are taken for whole without being decoded."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ssd_fast.data.images import image_problem
from ssd_fast.data.jpeg import jpeg_size

SIZE_HW = (30, 40)


def jpeg(mode: str = "RGB", **options: Any) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (*SIZE_HW, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def with_thumbnail() -> bytes:
    """A JPEG in whose header another whole one lies."""
    content, thumbnail = jpeg(), jpeg(quality=5)
    segment = b"Exif\0\0" + thumbnail
    return content[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2) + segment + content[2:]


WHOLE: dict[str, Callable[[], bytes]] = {
    "baseline": jpeg,
    "progressive": lambda: jpeg(progressive=True),
    "grey": lambda: jpeg("L"),
    "restart markers": lambda: jpeg(restart_marker_blocks=1),
    "comment": lambda: jpeg(comment=b"\xff\xd9" * 100),
    "profile": lambda: jpeg(icc_profile=b"\xff\xd9" * 5000),
    "thumbnail": with_thumbnail,
    "bytes after the end": lambda: jpeg() + b"\0" * 100,
}


@pytest.mark.parametrize("kind", WHOLE)
def test_a_jpeg_is_taken_for_whole_exactly_when_it_is(tmp_path: Path, kind: str) -> None:
    content = WHOLE[kind]()
    path = tmp_path / "image.jpg"
    path.write_bytes(content)
    assert jpeg_size(str(path)) == SIZE_HW
    assert image_problem(path, *SIZE_HW) is None
    end = content.rindex(b"\xff\xd9")
    for cut in {2, 20, end // 2, end - 50, end, end + 1}:
        path.write_bytes(content[:cut])
        assert jpeg_size(str(path)) is None


@pytest.mark.parametrize("content", [b"", b"\xff\xd8", b"\xff" * 100, b"\xff\xd8\xff\xc0\0\0" * 50, b"\x89PNG" * 9])
def test_anything_else_is_left_to_pillow(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "image.jpg"
    path.write_bytes(content)
    assert jpeg_size(str(path)) is None
    for other in (jpeg("CMYK"), jpeg()[:2] + jpeg()[2:].replace(b"\xff\xc0", b"\xff\xc9")):
        path.write_bytes(other)
        assert jpeg_size(str(path)) is None


def test_every_photograph_has_the_size_that_pillow_reads(coco_ccby: Path) -> None:
    known = 0
    for path in sorted((coco_ccby / "val2017").iterdir()):
        size = jpeg_size(str(path))
        with Image.open(path) as image:
            assert size in (None, (image.height, image.width))
        known += size is not None
    assert known > 50
