"""Clocks of a command: its time is divided into parts that follow each other without gaps."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch

from ssd_fast.hardware import synchronize
from ssd_fast.parts import DECODING, MODEL, PREPROCESSING
from ssd_fast.tables import Row, Table, format_table

_BATCH_PARTS = (PREPROCESSING, MODEL, DECODING)
_PERCENTILES = (50, 90, 99)

Batch = TypeVar("Batch")
_Mark: TypeAlias = float | torch.cuda.Event


class Interval(NamedTuple):
    """Begin and end of a part, in seconds since the timeline began."""

    part: str
    begin_s: float
    end_s: float


class NullTimeline:
    """A timeline that records nothing."""

    def region(self, part: str) -> AbstractContextManager[None]:
        """Record the work of the device within the region as a part."""
        return nullcontext()

    def waits(self, batches: Iterable[Batch], part: str) -> Iterator[Batch]:
        """Yield the batches; record the time until each one is there as a part."""
        return iter(batches)


NULL_TIMELINE = NullTimeline()


class Timeline(NullTimeline):
    """Divides the time since a moment into parts.

    Regions are timed on the device that computes. On a GPU events on its stream mark them; `settle` reads these, so
    that the host does not wait in between. Profilers (PyTorch's, on a GPU also Nsight) show a range of the same name.

    intervals: the regions before the last `settle`, in their order.
    """

    def __init__(self, device: torch.device, start_s: float) -> None:
        """start_s: begin of the first part, on the clock time.perf_counter."""
        self.intervals: list[Interval] = []
        self._device = device
        self._settled_s = self._start_s = start_s
        self._marked: list[tuple[str, _Mark, _Mark]] = []
        self._origin: tuple[float, _Mark] = (start_s, start_s)  # the same moment on both clocks
        self._seconds: dict[str, list[float]] = {}

    @contextmanager
    def region(self, part: str) -> Iterator[None]:
        with self._range(part):
            begin = self._mark()
            yield
            self._marked.append((part, begin, self._mark()))

    def waits(self, batches: Iterable[Batch], part: str) -> Iterator[Batch]:
        iterator = iter(batches)
        while True:
            with self._range(part):
                begin = self._mark()
                try:
                    batch = next(iterator)
                except StopIteration:
                    return
                self._marked.append((part, begin, self._mark()))
            yield batch

    def settle(self, part: str) -> None:
        """Wait for the device; record the time since the last `settle` as a part, without the regions in between."""
        synchronize(self._device)
        now = time.perf_counter()
        in_regions = 0.0
        for name, begin, end in self._marked:
            begin_s, end_s = self._since_start(begin), self._since_start(end)
            self.intervals.append(Interval(name, begin_s, end_s))
            in_regions += end_s - begin_s
            self._add(name, end_s - begin_s)
        self._add(part, now - self._settled_s - in_regions)
        self._settled_s = now
        self._marked = []
        self._origin = (now, self._mark())

    def parts(self) -> dict[str, list[float]]:
        """Seconds of every region and every settled part, by name, in the order in which the names first came."""
        return self._seconds

    @contextmanager
    def _range(self, part: str) -> Iterator[None]:
        """Show a part to profilers."""
        nvtx = torch.cuda.nvtx.range(part) if self._device.type == "cuda" else nullcontext()
        with torch.profiler.record_function(part), nvtx:
            yield

    def _mark(self) -> _Mark:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _since_start(self, mark: _Mark) -> float:
        if not isinstance(mark, torch.cuda.Event):
            return mark - self._start_s
        origin_s, origin = self._origin
        assert isinstance(origin, torch.cuda.Event), "settle comes before the first region"
        return origin_s - self._start_s + origin.elapsed_time(mark) / 1e3

    def _add(self, part: str, seconds: float) -> None:
        self._seconds.setdefault(part, []).append(seconds)


def format_report(parts: Mapping[str, Sequence[float]], *, num_images: int, batch_size: int) -> str:
    """A table of an evaluation: seconds of each part and their sum, percentiles over the batches, images per second.

    parts: of `Timeline.parts`. Seconds are rounded to milliseconds before they are added up, so that the printed ones
    add up too. Percentiles are nearest ranks.
    """
    seconds = {part: round(sum(laps), 3) for part, laps in parts.items()}
    total = round(sum(seconds.values()), 3)
    rows = []
    for part, value in seconds.items():
        percentiles = _percentiles(parts[part]) if part in _BATCH_PARTS else [""] * len(_PERCENTILES)
        rows.append(Row([part, f"{value:.3f}", f"{value / total:.1%}", *percentiles]))
    rows.append(Row(["total", f"{total:.3f}", f"{1:.1%}", *[""] * len(_PERCENTILES)]))
    whole = f"{_BATCH_PARTS[0]} to {_BATCH_PARTS[-1]}"
    batches = np.sum([parts[part] for part in _BATCH_PARTS], axis=0)
    rows.append(Row([whole, "", "", *_percentiles(batches)]))
    columns = ["", "s", "share", *(f"p{percent} ms" for percent in _PERCENTILES)]
    in_batches = round(sum(seconds[part] for part in _BATCH_PARTS), 3)
    return "\n".join(
        [
            format_table(Table("Time", columns, rows, "percentiles: of a batch")),
            f"{num_images} images in {len(batches)} batches of {batch_size}",
            f"{num_images / in_batches:.4g} images/s from {whole} ({in_batches:.3f} s)",
            f"{num_images / total:.4g} images/s in all ({total:.3f} s)",
        ]
    )


def format_line(parts: Mapping[str, Sequence[float]], *, num_images: int) -> str:
    """One line: the sum of all parts, images per second, and every part of at least 5 ms."""
    seconds = {part: round(sum(laps), 2) for part, laps in parts.items()}
    total = round(sum(seconds.values()), 2)
    listed = ", ".join(f"{part} {value:.2f}" for part, value in seconds.items() if value)
    return f"{num_images} images in {total:.2f} s, {num_images / total:.4g} a second ({listed})"


def _percentiles(seconds: Sequence[float] | np.ndarray) -> list[str]:
    values = np.percentile(1e3 * np.asarray(seconds), _PERCENTILES, method="inverted_cdf")
    return [f"{value:.2f}" for value in values]
