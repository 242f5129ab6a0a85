"""Where the time of a command goes: parts that follow each other without gaps, on the clock of what computes."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch

from ssd_fast.parts import DECODING, MODEL, PREPROCESSING

_OF_A_BATCH = (PREPROCESSING, MODEL, DECODING)
_PERCENTILES = (50, 90, 99)

Batch = TypeVar("Batch")
_Mark: TypeAlias = float | torch.cuda.Event


class Interval(NamedTuple):
    """When a part was under way, seconds since the timeline's begin."""

    part: str
    begin_s: float
    end_s: float


class NullTimeline:
    """A timeline that records nothing."""

    def region(self, part: str) -> AbstractContextManager[None]:
        """What the device does within it is a part."""
        return nullcontext()

    def waits(self, batches: Iterable[Batch], part: str) -> Iterator[Batch]:
        """The batches; what it takes until each is there is a part."""
        return iter(batches)


NULL_TIMELINE = NullTimeline()


class Timeline(NullTimeline):
    """Divides the time since a moment into parts.

    Regions are timed on the device that computes: on a GPU by events on its stream, which `settle` reads, so that the
    host does not wait in between. Profilers (PyTorch's, on a GPU also Nsight) see a range of the same name.
    """

    def __init__(self, device: torch.device, start_s: float) -> None:
        """start_s: where the first part begins, of time.perf_counter."""
        self.intervals: list[Interval] = []
        """Of the regions before the last `settle`, in their order."""
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
        """Waits for the device; the time since the last call of this is a part, less the regions in between."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
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
        """Seconds of every region or settled part, by name, in the order in which they first came."""
        return self._seconds

    @contextmanager
    def _range(self, part: str) -> Iterator[None]:
        """What profilers show."""
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
    """A table for people: every part, their sum, percentiles over the batches (nearest rank), images per second.

    parts: of `Timeline.parts`. Seconds are rounded to milliseconds before they are added up, so that what is printed
    adds up too.
    """
    seconds = {part: round(sum(laps), 3) for part, laps in parts.items()}
    total = round(sum(seconds.values()), 3)
    heads = [f"p{percent}" for percent in _PERCENTILES]
    lines = [f"{'':<18}{'s':>12}{'share':>8}   {'ms of a batch:':>15}" + "".join(f"{head:>10}" for head in heads)]
    for part, value in seconds.items():
        line = f"{part:<18}{value:>12.3f}{value / total:>8.1%}"
        lines.append(line + (" " * 18 + _percentiles(parts[part]) if part in _OF_A_BATCH else ""))
    lines.append(f"{'total':<18}{total:>12.3f}{1:>8.1%}")
    in_batches = round(sum(seconds[part] for part in _OF_A_BATCH), 3)
    of_batches = np.sum([parts[part] for part in _OF_A_BATCH], axis=0)
    lines += [
        f"{f'{_OF_A_BATCH[0]} to {_OF_A_BATCH[-1]}':<56}" + _percentiles(of_batches),
        f"{num_images} images in {len(of_batches)} batches of {batch_size}",
        f"{num_images / in_batches:.4g} images/s from {_OF_A_BATCH[0]} to {_OF_A_BATCH[-1]} ({in_batches:.3f} s)",
        f"{num_images / total:.4g} images/s in all ({total:.3f} s)",
    ]
    return "\n".join(lines)


def format_line(parts: Mapping[str, Sequence[float]], *, num_images: int) -> str:
    """One line for people: the sum of all parts, images per second, and every part that one sees."""
    seconds = {part: round(sum(laps), 2) for part, laps in parts.items()}
    total = round(sum(seconds.values()), 2)
    listed = ", ".join(f"{part} {value:.2f}" for part, value in seconds.items() if value)
    return f"{num_images} images in {total:.2f} s, {num_images / total:.4g} a second ({listed})"


def _percentiles(seconds: Sequence[float] | np.ndarray) -> str:
    values = np.percentile(1e3 * np.asarray(seconds), _PERCENTILES, method="inverted_cdf")
    return "".join(f"{value:>10.2f}" for value in values)
