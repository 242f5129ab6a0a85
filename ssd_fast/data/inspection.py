"""The images of a data set, looked at before anything decodes them: by all ranks together, and once for each file."""

from __future__ import annotations

import hashlib
import math
import os
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dali_pipelines.batch import LabelledImages
from ssd_fast.data import cache
from ssd_fast.data.images import image_problem
from ssd_fast.progress import track

if TYPE_CHECKING:  # the process that reads annotations starts without torch
    from ssd_fast.distributed.world import World

_LARGE = 10_000  # images: smaller sets are inspected within a second, so that nothing is shown or kept
_CHUNK = 256
_SLOW_S = 1e-4  # a file


class _Found(NamedTuple):
    """problems: by row of the set. stamps: [N, 2] int64, size in bytes and time of change in ns; 0 for a bad image."""

    problems: dict[int, str]
    stamps: np.ndarray


def inspect_images(images: LabelledImages, world: World | None, max_pixels: float = math.inf) -> dict[int, str]:
    """The problems of images by their row, texts that name the file and what was expected; on all ranks.

    Each rank looks at its share. A file of a large set that was found good, and has kept its size and its time since,
    is not opened again.

    world: None for this process alone. max_pixels: of the largest image that is accepted.
    """
    num_images = len(images.file_names)
    is_large = num_images >= _LARGE
    rank, size = (world.rank, world.size) if world else (0, 1)
    name = _entry_name(images, max_pixels) if is_large and rank == 0 else ""
    entry = cache.load_entry(name) if name else None
    known = entry.arrays["stamps"] if entry else np.zeros((num_images, 2), np.int64)
    if world:
        known = world.broadcast(known)
    own = _inspect(images, range(rank, num_images, size), known, max_pixels, is_large=is_large)
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


def _entry_name(images: LabelledImages, max_pixels: float) -> str:
    names = hashlib.sha256("\0".join(images.file_names).encode(errors="surrogatepass"))
    return cache.entry_name(
        images.image_dir.absolute(), names.hexdigest(), zlib.crc32(images.sizes_hw.tobytes()), max_pixels
    )


def _inspect(
    images: LabelledImages, rows: Sequence[int], known: np.ndarray, max_pixels: float, *, is_large: bool
) -> _Found:
    """What is found in some rows of a set.

    Threads wait side by side for a slow disk or network, and decode side by side; where a file takes microseconds, as
    the first ones show, eight threads take three times as long as one.
    """
    inspect_chunk = partial(_inspect_chunk, images, known, max_pixels)
    chunks = [rows[start : start + _CHUNK] for start in range(0, len(rows), _CHUNK)]
    start_s = time.perf_counter()
    parts = [inspect_chunk(chunk) for chunk in chunks[:1]]
    is_slow = time.perf_counter() - start_s > _SLOW_S * _CHUNK
    with ThreadPoolExecutor(max_workers=8 if is_slow else 1) as pool:
        found = pool.map(inspect_chunk, chunks[1:])
        parts += track(found, f"inspecting images, {_CHUNK} at a time", len(chunks) - 1) if is_large else found
    return _Found(
        {row: problem for part in parts for row, problem in part.problems.items()},
        np.concatenate([np.zeros((0, 2), np.int64), *(part.stamps for part in parts)]),
    )


def _inspect_chunk(images: LabelledImages, known: np.ndarray, max_pixels: float, rows: Sequence[int]) -> _Found:
    folder, names = str(images.image_dir), images.file_names
    problems, stamps = {}, []
    for row, (height, width), good in zip(rows, images.sizes_hw[rows].tolist(), known[rows].tolist(), strict=True):
        path = os.path.join(folder, names[row])
        stamp = [0, 0]
        with suppress(OSError):  # image_problem says what is wrong
            status = os.stat(path)
            stamp = [status.st_size, status.st_mtime_ns]
        if stamp != good or not stamp[0]:
            problem = image_problem(path, height, width, max_pixels)
            if problem:
                problems[row], stamp = problem, [0, 0]
        stamps.append(stamp)
    return _Found(problems, np.array(stamps, np.int64))
