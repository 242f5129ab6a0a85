"""Files that are taken for good, or for bad, without being decoded."""

import io
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dali_pipelines.decode import decode_image
from ssd_fast.data.headers import read_header
from ssd_fast.data.images import find_images, image_problem
from ssd_fast.data.policy import DataError

SIZE_HW = (30, 40)
PIXELS = np.random.default_rng(0).integers(0, 256, (*SIZE_HW, 3), np.uint8)


def encoded(kind: str, mode: str = "RGB", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def jpeg(mode: str = "RGB", **options: Any) -> bytes:
    return encoded("JPEG", mode, **options)


def with_segment(segment: bytes, *, marker: int = 0xE1, content: bytes | None = None) -> bytes:
    """A JPEG with a segment at its start."""
    content = content or jpeg()
    return content[:2] + bytes([0xFF, marker]) + (len(segment) + 2).to_bytes(2) + segment + content[2:]


def before_frame(added: bytes) -> bytes:
    content = jpeg()
    frame = content.index(b"\xff\xc0")
    return content[:frame] + added + content[frame:]


def second_frame() -> bytes:
    content = jpeg()
    frame = content.index(b"\xff\xc0")
    return before_frame(content[frame : frame + 2 + int.from_bytes(content[frame + 2 : frame + 4])])


def chunk(kind: bytes, data: bytes, *, is_right: bool = True) -> bytes:
    checksum = zlib.crc32(kind + data) if is_right else 0
    return len(data).to_bytes(4) + kind + data + checksum.to_bytes(4)


def png(added: bytes = b"", *, rows: bytes | None = None, end: bytes = chunk(b"IEND", b"")) -> bytes:
    """A PNG with chunks added after its first one."""
    lines = b"".join(b"\0" + row.tobytes() for row in PIXELS) if rows is None else rows
    first = chunk(b"IHDR", SIZE_HW[1].to_bytes(4) + SIZE_HW[0].to_bytes(4) + bytes([8, 2, 0, 0, 0]))
    return b"\x89PNG\r\n\x1a\n" + first + added + chunk(b"IDAT", zlib.compress(lines)) + end


WHOLE: dict[str, Callable[[], bytes]] = {
    "baseline": jpeg,
    "progressive": lambda: jpeg(progressive=True),
    "grey": lambda: jpeg("L"),
    "restart markers": lambda: jpeg(restart_marker_blocks=1),
    "comment": lambda: jpeg(comment=b"\xff\xd9" * 100),
    "profile": lambda: jpeg(icc_profile=b"\xff\xd9" * 9000),
    "thumbnail": lambda: with_segment(b"Exif\0\0" + jpeg(quality=5)),
    "long metadata": lambda: with_segment(bytes(60_000), content=with_segment(bytes(60_000))),
    "bytes after the end": lambda: jpeg() + b"\0" * 100,
    "many bytes after the end": lambda: jpeg() + b"\0" * 10_000,
}
ODD_METADATA: dict[str, Callable[[], bytes]] = {
    "EXIF of nothing": lambda: with_segment(b"Exif\0\0" + b"\xff" * 24),
    "profile of two parts of which one is missing": lambda: with_segment(b"ICC_PROFILE\0\1\2abc", marker=0xE2),
    "short Adobe marker": lambda: with_segment(b"Adobe\0", marker=0xEE),
    "short JFIF marker": lambda: with_segment(b"JFIF\0\1", marker=0xE0),
    "empty segment": lambda: with_segment(b"", marker=0xE3),
    "comment that is not UTF-8": lambda: with_segment(b"\xff\xfe\x80", marker=0xFE),
    "fill bytes": lambda: before_frame(b"\xff\xff\xff"),
    **{
        f"{kind.decode()} of {len(data)} bytes, checksum {'right' if is_right else 'wrong'}": (
            partial(png, chunk(kind, data, is_right=is_right))
        )
        for kind, data in (
            (b"pHYs", bytes(3)),
            (b"gAMA", bytes(2)),
            (b"cHRM", bytes(5)),
            (b"sRGB", b""),
            (b"tRNS", bytes(3)),
            (b"iCCP", b"name\0\0abc"),
            (b"tEXt", b"x" * 2**20),
            (b"zTXt", b"key\0\0abc"),
            (b"iTXt", b"key"),
            (b"eXIf", b"junk"),
            (b"tIME", b""),
        )
        for is_right in (True, False)
    },
}
BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing": (lambda: b"", "not an image"),
    "text": (lambda: b"<!DOCTYPE html>", "not an image"),
    "start of a JPEG": (lambda: b"\xff\xd8\xff", "ends within its header"),
    "no JPEG segment": (lambda: b"\xff\xd8" + b"\xff" * 100, "ends within its header"),
    "frames of nothing": (lambda: b"\xff\xd8" + b"\xff\xc0\0\0" * 50, "no JPEG segment at byte 2"),
    "noise between segments": (lambda: before_frame(b"\x12\x34\x56"), "no JPEG segment at byte"),
    "segment of no length": (lambda: before_frame(b"\xff\xe3\0\0"), "no JPEG segment at byte"),
    "restart marker in the header": (lambda: before_frame(b"\xff\xd0"), "marker D0"),
    "two frames": (second_frame, "two JPEG frame headers"),
    "no frame": (lambda: jpeg().replace(b"\xff\xc0", b"\xff\xe5"), "no JPEG frame header"),
    "12 bits": (lambda: jpeg().replace(b"\xff\xc0\0\x11\x08", b"\xff\xc1\0\x11\x0c"), "12 bits a channel"),
    "CMYK": (lambda: jpeg("CMYK").replace(b"Adobe", b"Abode"), "without Adobe's marker"),
    "arithmetic code": (lambda: jpeg().replace(b"\xff\xc0", b"\xff\xcb"), "damaged, or of a rare kind"),
    "PNG": (lambda: b"\x89PNG" * 9, "not an image"),
    "start of a PNG": (lambda: png()[:20], "its first PNG chunk is not IHDR"),
    "16 bits": (lambda: png().replace(b"\x08\x02", b"\x10\x02", 1), "more than 8 bits a channel"),
    "PNG cut short": (lambda: png()[:-20], "its last PNG chunk is missing"),
    "PNG without end": (lambda: png(end=b""), "its last PNG chunk is missing"),
    "PNG without rows": (lambda: png(rows=bytes(121 * 20)), "damaged, or of a rare kind"),
    "PNG of a filter that does not exist": (lambda: png(rows=b"\x09" * 121 * 30), "damaged, or of a rare kind"),
    "PNG with an unknown chunk that matters": (lambda: png(chunk(b"ABCD", b"")), "damaged, or of a rare kind"),
    "no pixels": (lambda: jpeg().replace(b"\xff\xc0\0\x11\x08\0\x1e", b"\xff\xc0\0\x11\x08\0\0"), "40 x 0 pixels"),
}


def problem(path: Path) -> str | None:
    return image_problem(str(path), *SIZE_HW, max_pixels=10_000)


@pytest.mark.parametrize("kind", WHOLE)
def test_a_jpeg_is_taken_for_whole_exactly_when_it_is(tmp_path: Path, kind: str) -> None:
    content = WHOLE[kind]()
    path = tmp_path / "image.jpg"
    path.write_bytes(content)
    assert read_header(str(path)) == (*SIZE_HW, True)
    assert problem(path) is None
    end = content.rindex(b"\xff\xd9")
    for cut in {2, 20, end // 2, end - 50, end, end + 1}:
        path.write_bytes(content[:cut])
        with pytest.raises(DataError, match=r"image\.jpg: (not an image|cannot be decoded: .*(ends|short))"):
            read_header(str(path))


@pytest.mark.parametrize("kind", ODD_METADATA)
def test_metadata_cannot_hurt(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "image"
    path.write_bytes(ODD_METADATA[kind]())
    assert problem(path) is None
    assert decode_image(path).shape == (*SIZE_HW, 3)
    assert find_images([path], bad_images="error").orientations.tolist() == [1]


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_image_is_named_with_what_is_wrong(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "image"
    content, message = BAD[kind]
    path.write_bytes(content())
    found = problem(path)
    assert found
    assert found.startswith(f"{path}: ")
    assert message in found
    if "bits" not in kind and kind != "CMYK":  # which a decoder takes, with other colours
        with pytest.raises(ValueError, match="image: cannot be decoded"):
            decode_image(path)


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    assert problem(tmp_path / "a.jpg") == f"{tmp_path}/a.jpg: no such image"
    assert problem(tmp_path) == f"{tmp_path}: cannot be read: Is a directory"
    (tmp_path / "large.jpg").write_bytes(jpeg())
    assert "30 pixels: expected at most data.max_image_pixels = 1199" in str(
        image_problem(str(tmp_path / "large.jpg"), *SIZE_HW, max_pixels=1199)
    )


def test_every_photograph_has_the_size_that_pillow_reads(coco_ccby: Path) -> None:
    for path in sorted((coco_ccby / "val2017").iterdir()):
        with Image.open(path) as image:
            assert read_header(str(path)) == (image.height, image.width, True)
