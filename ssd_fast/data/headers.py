"""The headers of JPEG and PNG files: what is read of an image before it is decoded, from a few of its bytes.

Metadata are passed over, whatever they hold.
"""

import os
from collections.abc import Callable
from typing import NamedTuple

from ssd_fast.data.policy import DataError

FORMATS = "JPEG or PNG"

Read = Callable[[int, int], bytes]
"""A number of bytes from a place of a file; fewer at its end."""

_BLOCK_BYTES, _TAIL_BYTES = 4096, 512
_JPEG_START, _JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
_COMMON_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive, all with Huffman codes
_OTHER_FRAMES = (0xC3, *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0))
_SCAN, _ADOBE = 0xDA, 0xEE
_FILLING = 0xFF
_TABLES_AND_METADATA = (0xC4, 0xCC, *range(0xDB, 0xE0), *range(0xE0, 0xF0), 0xFE)
_PNG_START = b"\x89PNG\r\n\x1a\n"


class Header(NamedTuple):
    """height, width: of the stored pixels.

    is_sure: whether the file can be decoded follows from its structure; if not, only decoding it can tell.
    """

    height: int
    width: int
    is_sure: bool


class _Frame(NamedTuple):
    """What the frame header of a JPEG says; is_common: its coding is one of the common three."""

    height: int
    width: int
    num_channels: int
    is_common: bool


def read_header(path: str) -> Header:
    """The header of a whole JPEG or PNG file of 8 bits per channel, in colours that a decoder knows.

    Raises DataError that names the file for any other one.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            return _parse(path, lambda place, number: os.pread(descriptor, number, place), os.fstat(descriptor).st_size)
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        raise DataError(f"{path}: no such image") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _parse(path: str, read: Read, num_bytes: int) -> Header:
    block = read(0, _BLOCK_BYTES)
    if block.startswith(_JPEG_START):
        header = _parse_jpeg(path, block, read, num_bytes)
    elif block.startswith(_PNG_START):
        header = _parse_png(path, block, read, num_bytes)
    else:
        raise DataError(f"{path}: not an image: expected an 8-bit {FORMATS}")
    if not header.height or not header.width:
        raise DataError(f"{path}: cannot be decoded: {header.width} x {header.height} pixels")
    return header


def _parse_jpeg(path: str, block: bytes, read: Read, num_bytes: int) -> Header:
    """The segments up to the first scan, and the end marker after it: a scan cannot hold one, but a thumbnail has one.

    block: of bytes at the start of the file.
    """
    frame: _Frame | None = None
    has_adobe = False
    place = block_start = 2  # of the next marker; of the block
    block = block[2:]
    while True:
        head = block[place - block_start : place - block_start + 10]
        if len(head) < 10 and place + 10 <= num_bytes:
            block, block_start = read(place, _BLOCK_BYTES), place
            head = block[:10]
        if len(head) < 10:
            raise DataError(f"{path}: cannot be decoded: the file ends within its header")
        marker, length = head[1], int.from_bytes(head[2:4])
        if head[0] != _FILLING or (marker != _FILLING and length < 2):
            raise DataError(f"{path}: cannot be decoded: no JPEG segment at byte {place}, where one is expected")
        if marker == _SCAN:
            break
        if marker == _FILLING:
            length = -1
        elif marker in _COMMON_FRAMES or marker in _OTHER_FRAMES:
            if frame:
                raise DataError(f"{path}: cannot be decoded: it has two JPEG frame headers")
            if head[4] != 8:
                raise DataError(f"{path}: has {head[4]} bits a channel: expected an 8-bit {FORMATS}")
            sides = int.from_bytes(head[5:7]), int.from_bytes(head[7:9])
            frame = _Frame(*sides, num_channels=head[9], is_common=marker in _COMMON_FRAMES)
        elif marker == _ADOBE:
            has_adobe |= length >= 14 and head[4:9] == b"Adobe"
        elif marker not in _TABLES_AND_METADATA:
            raise DataError(f"{path}: cannot be decoded: marker {marker:02X} in its JPEG header")
        place += 2 + length
    if not frame:
        raise DataError(f"{path}: cannot be decoded: it has no JPEG frame header")
    if frame.num_channels == 4 and not has_adobe:
        raise DataError(f"{path}: a CMYK image without Adobe's marker: expected RGB, grey, or the marker")
    if not _has_end(read, place + length, num_bytes):
        raise DataError(f"{path}: cannot be decoded: the file is cut short, its end marker is missing")
    return Header(frame.height, frame.width, frame.is_common and frame.num_channels in (1, 3))


def _has_end(read: Read, scan: int, num_bytes: int) -> bool:
    """Whether the end marker of a JPEG is found after the start of its first scan; mostly it is the last thing."""
    if _JPEG_END in read(max(scan, num_bytes - _TAIL_BYTES), _TAIL_BYTES):
        return True
    return _JPEG_END in read(scan, max(num_bytes - scan, 0))


def _parse_png(path: str, block: bytes, read: Read, num_bytes: int) -> Header:
    """The first chunk, and the heads of all others up to the last one."""
    place = len(_PNG_START)
    if block[place + 4 : place + 8] != b"IHDR" or len(block) < place + 25:
        raise DataError(f"{path}: cannot be decoded: its first PNG chunk is not IHDR")
    width, height = int.from_bytes(block[place + 8 : place + 12]), int.from_bytes(block[place + 12 : place + 16])
    if block[place + 16] > 8:
        raise DataError(f"{path}: has more than 8 bits a channel: expected an 8-bit {FORMATS}")
    kind = b""
    while kind != b"IEND":
        head = read(place, 8)
        if len(head) < 8 or place + 12 > num_bytes:
            raise DataError(f"{path}: cannot be decoded: the file is cut short, its last PNG chunk is missing")
        kind = head[4:8]
        place += 12 + int.from_bytes(head[:4])
    return Header(height, width, is_sure=False)
