"""Where the time of a command goes: parts that follow each other without gaps, on the clock of what computes."""

import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from ssd_fast.distributed import usable_cores

PREPROCESSING, MODEL, DECODING = "pre-processing", "model", "decoding and NMS"
_OF_A_BATCH = (PREPROCESSING, MODEL, DECODING)
_PERCENTILES = (50, 90, 99)


class Timeline:
    """Divides the time since a moment into parts.

    Laps are those of the device that computes. On a GPU events on its stream mark them, which `settle` reads: the
    host does not wait from one lap to the next.
    """

    def __init__(self, device: torch.device, start_s: float) -> None:
        """start_s: where the first part begins, of time.perf_counter."""
        self._device = device
        self._settled_s = start_s
        self._laps: list[tuple[str, float | torch.cuda.Event]] = []
        self._seconds: dict[str, list[float]] = {}

    def lap(self, part: str) -> None:
        """Says that what the device did since the last call, of `settle` or of this, was a part."""
        self._laps.append((part, self._mark()))

    def settle(self, part: str) -> None:
        """Waits for the device; the time since the last call of this is a part, less the laps in between."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        in_laps = 0.0
        for (_, begin), (name, end) in zip(self._laps, self._laps[1:], strict=False):
            seconds = _between(begin, end)
            in_laps += seconds
            self._add(name, seconds)
        self._add(part, now - self._settled_s - in_laps)
        self._settled_s = now
        self._laps = [("", self._mark())]

    def parts(self) -> dict[str, list[float]]:
        """Seconds of every lap or settled part, by name, in the order in which they first came."""
        return self._seconds

    def _mark(self) -> float | torch.cuda.Event:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _add(self, part: str, seconds: float) -> None:
        self._seconds.setdefault(part, []).append(seconds)


def _between(begin: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(begin, torch.cuda.Event):
        assert isinstance(end, torch.cuda.Event)
        return begin.elapsed_time(end) / 1e3
    assert isinstance(end, float)
    return end - begin


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
    return f"{num_images} pictures in {total:.2f} s, {num_images / total:.4g} a second ({listed})"


def _percentiles(seconds: Sequence[float] | np.ndarray) -> str:
    values = np.percentile(1e3 * np.asarray(seconds), _PERCENTILES, method="inverted_cdf")
    return "".join(f"{value:>10.2f}" for value in values)


def device_name(device: torch.device) -> str:
    """What people call the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu_info = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in cpu_info if line.startswith("model name")), None)
    return f"{model or platform.machine()}, {usable_cores()} cores"
