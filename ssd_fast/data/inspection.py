"""The images of a data set, looked at before anything decodes them: by all ranks together, and once for each file."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dali_pipelines.batch import LabelledImages
from ssd_fast.data import cache
from ssd_fast.data.images import image_problem, largest_image
from ssd_fast.data.jpeg import jpeg_size
from ssd_fast.progress import track

if TYPE_CHECKING:  # the process that reads annotations starts without torch
    from ssd_fast.distributed.world import World

_LARGE = 10_000  # images: smaller sets are inspected within a second, so that nothing is shown or kept
_CHUNK = 256


class _Found(NamedTuple):
    """problems: by row of the set. stamps: [N, 2] int64, size in bytes and time of change in ns; 0 for a bad image."""

    problems: dict[int, str]
    stamps: np.ndarray


def inspect_images(images: LabelledImages, world: World | None) -> dict[int, str]:
    """The problems of images by their row, texts that name the file and what was expected; on all ranks.

    Each rank looks at its share. A file of a large set that was found good, and has kept its size and its time since,
    is not opened again. world: None for this process alone.
    """
    num_images = len(images.file_names)
    is_large = num_images >= _LARGE
    rank, size = (world.rank, world.size) if world else (0, 1)
    name = _entry_name(images) if is_large and rank == 0 else ""
    entry = cache.load_entry(name) if name else None
    known = entry.arrays["stamps"] if entry else np.zeros((num_images, 2), np.int64)
    if world:
        known = world.broadcast(known)
    own = _inspect(images, range(rank, num_images, size), known, is_large=is_large)
    shares = world.gather(own) if world else [own]
    problems: dict[int, str] = {}
    stamps = np.zeros((num_images, 2), np.int64)
    for other, share in enumerate(shares):  # none but on the first rank
        problems |= share.problems
        stamps[other::size] = share.stamps
    if name and not np.array_equal(stamps, known):
        cache.store_entry(name, {}, {"stamps": stamps})
    problems = dict(sorted(problems.items()))
    return world.broadcast(problems) if world else problems


def _entry_name(images: LabelledImages) -> str:
    names = hashlib.sha256("\0".join(images.file_names).encode(errors="surrogatepass"))
    return cache.entry_name(images.image_dir.absolute(), names.hexdigest(), zlib.crc32(images.sizes_hw.tobytes()))


def _inspect(images: LabelledImages, rows: Sequence[int], known: np.ndarray, *, is_large: bool) -> _Found:
    chunks = [rows[start : start + _CHUNK] for start in range(0, len(rows), _CHUNK)]
    with ThreadPoolExecutor(max_workers=8) as pool:
        found = pool.map(partial(_inspect_chunk, images, known), chunks)
        parts = list(track(found, f"inspecting images, {_CHUNK} at a time", len(chunks)) if is_large else found)
    return _Found(
        {row: problem for part in parts for row, problem in part.problems.items()},
        np.concatenate([np.zeros((0, 2), np.int64), *(part.stamps for part in parts)]),
    )


def _inspect_chunk(images: LabelledImages, known: np.ndarray, rows: Sequence[int]) -> _Found:
    folder, names = str(images.image_dir), images.file_names
    problems, stamps = {}, []
    for row, (height, width), good in zip(rows, images.sizes_hw[rows].tolist(), known[rows].tolist(), strict=True):
        path = os.path.join(folder, names[row])
        stamp = [0, 0]
        with suppress(OSError):  # image_problem says what is wrong
            status = os.stat(path)
            stamp = [status.st_size, status.st_mtime_ns]
        if stamp != good or not stamp[0]:
            is_good = stamp[0] and height * width <= largest_image() and jpeg_size(path) == (height, width)
            problem = None if is_good else image_problem(Path(path), height, width)
            if problem:
                problems[row], stamp = problem, [0, 0]
        stamps.append(stamp)
    return _Found(problems, np.array(stamps, np.int64))
