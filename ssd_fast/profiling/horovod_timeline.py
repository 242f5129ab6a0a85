"""Gradients in a Horovod timeline: when each is ready, what they are averaged with, and how much of that is hidden."""

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

_GRADIENT = re.compile(r"(grouped_)?allreduce\..+\.(weight|bias)(_\d+of\d+)?")  # a group has the name of its first one
_DTYPE_BYTES = {"float16": 2, "float32": 4, "float64": 8}


class Transfer(NamedTuple):
    """One gradient in one step, on the clock of the timeline.

    ready_s: the first rank has it. agreed_s: all ranks have it, and know that. start_s, end_s: it is being averaged.
    """

    name: str
    num_elements: int
    bytes: int
    ready_s: float
    agreed_s: float
    start_s: float
    end_s: float


class Gradient(NamedTuple):
    """ready: fraction of the time between the first and the last gradient of a step."""

    num_elements: int
    ready: float


class Measured(NamedTuple):
    """Figures of a timeline. Times and counts are medians over its steps.

    buckets: gradients that were averaged together. window_s: from the first gradient to the last.
    wait_s: from ready on one rank to agreed, median of all gradients; the unevenness of ranks is part of it.
    transfer_s: of all buckets. hidden: share of transfer_s before the last gradient was agreed on.
    exposed_s: from then to the end of the last bucket. gradients: sorted by `ready`.
    """

    num_steps: int
    bytes: int
    num_buckets: float
    largest_bucket_bytes: float
    window_s: float
    wait_s: float
    transfer_s: float
    hidden: float
    exposed_s: float
    gradients: tuple[Gradient, ...]


class _Bucket(NamedTuple):
    """Gradients that were averaged together."""

    start_s: float
    end_s: float
    bytes: int


class _Activity(NamedTuple):
    name: str
    start_s: float
    end_s: float
    arguments: dict[str, str]


def read_timeline(path: Path) -> list[list[Transfer]]:
    """Gradients of every complete step. The first step is left out: Horovod does not know them yet.

    path: the file that HOROVOD_TIMELINE named; the run may have been killed.
    Raises ValueError if it is not such a file, or if it has fewer than two steps with gradients of parameters.
    """
    transfers: dict[str, list[Transfer]] = defaultdict(list)
    for name, activities in _activities(_read_events(path)):
        if _GRADIENT.fullmatch(name):
            transfers[name].extend(_transfers(name, activities))
    num_steps = min((len(steps) for steps in transfers.values()), default=0)
    if num_steps < 2:
        raise ValueError(f"{path}: expected a Horovod timeline of at least 2 training steps, found {num_steps}")
    return [[steps[step] for steps in transfers.values()] for step in range(1, num_steps)]


def measure(steps: Sequence[Sequence[Transfer]]) -> Measured:
    """Return medians over the steps of a timeline."""
    buckets = [_buckets(step) for step in steps]
    first = [min(t.ready_s for t in step) for step in steps]
    window = [max(t.ready_s for t in step) - start for step, start in zip(steps, first, strict=True)]
    agreed = [max(t.agreed_s for t in step) for step in steps]
    busy = [sum(bucket.end_s - bucket.start_s for bucket in step) for step in buckets]
    hidden = [
        sum(max(0.0, min(bucket.end_s, last) - bucket.start_s) for bucket in step)
        for step, last in zip(buckets, agreed, strict=True)
    ]
    ready = [
        median(
            (step[i].ready_s - start) / (length or 1) for step, start, length in zip(steps, first, window, strict=True)
        )
        for i in range(len(steps[0]))
    ]
    gradients = [Gradient(t.num_elements, fraction) for t, fraction in zip(steps[0], ready, strict=True)]
    return Measured(
        num_steps=len(steps),
        bytes=sum(t.bytes for t in steps[0]),
        num_buckets=median(len(step) for step in buckets),
        largest_bucket_bytes=median(max(bucket.bytes for bucket in step) for step in buckets),
        window_s=median(window),
        wait_s=median(t.agreed_s - t.ready_s for step in steps for t in step),
        transfer_s=median(busy),
        hidden=median(part / whole for part, whole in zip(hidden, busy, strict=True)),
        exposed_s=median(max(t.end_s for t in step) - last for step, last in zip(steps, agreed, strict=True)),
        gradients=tuple(sorted(gradients, key=lambda gradient: gradient.ready)),
    )


def _read_events(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8").rstrip()
    if not text.endswith("]"):  # the run was killed, perhaps within an event
        text = text[: text.rfind("},") + 1] + "]"
    try:
        events = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected a Horovod timeline: {error}") from None
    if not (isinstance(events, list) and all(isinstance(event, dict) and "ph" in event for event in events)):
        raise ValueError(f"{path}: expected a Horovod timeline, a list of trace events")
    return events


def _activities(events: Iterable[dict[str, Any]]) -> Iterator[tuple[str, list[_Activity]]]:
    """Names of tensors, each with its activities in the order in which they ended."""
    names: dict[int, str] = {}
    begun: dict[int, list[tuple[str, float]]] = defaultdict(list)
    ended: dict[int, list[_Activity]] = defaultdict(list)
    for event in events:
        match event:
            case {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}}:
                names[pid] = name
            case {"ph": "B", "pid": pid, "name": name, "ts": microseconds}:
                begun[pid].append((name, microseconds / 1e6))
            case {"ph": "E", "pid": pid, "ts": microseconds} if begun[pid]:
                ended[pid].append(_Activity(*begun[pid].pop(), microseconds / 1e6, event.get("args", {})))
    for pid, name in names.items():
        yield name, ended[pid]


def _transfers(name: str, activities: Iterable[_Activity]) -> Iterator[Transfer]:
    negotiated = None
    start_s = None
    for activity in activities:
        if activity.name == "NEGOTIATE_ALLREDUCE":
            negotiated, start_s = activity, None
        elif activity.name == "MEMCPY_IN_FUSION_BUFFER" or activity.name.endswith("_ALLREDUCE"):
            start_s = activity.start_s if start_s is None else start_s
        elif activity.name == "ALLREDUCE" and negotiated is not None and start_s is not None:
            num_elements = math.prod(json.loads(activity.arguments["shape"]))
            num_bytes = num_elements * _DTYPE_BYTES[activity.arguments["dtype"]]
            yield Transfer(name, num_elements, num_bytes, negotiated.start_s, negotiated.end_s, start_s, activity.end_s)


def _buckets(step: Iterable[Transfer]) -> list[_Bucket]:
    """Transfers that overlap form a bucket: Horovod averages at the same time only what it has joined."""
    buckets: list[_Bucket] = []
    for transfer in sorted(step, key=lambda transfer: transfer.start_s):
        bucket = _Bucket(transfer.start_s, transfer.end_s, transfer.bytes)
        if buckets and bucket.start_s < buckets[-1].end_s:
            last = buckets.pop()
            bucket = _Bucket(last.start_s, max(bucket.end_s, last.end_s), bucket.bytes + last.bytes)
        buckets.append(bucket)
    return buckets
