"""A Horovod timeline that is made up."""

import json
from pathlib import Path

STEP_MS = 100


def events(pid: int, name: str, shape: list[int], times_ms: tuple[int, ...]) -> list[dict[str, object]]:
    """A tensor in three steps; times_ms: ready, agreed, start and end of the transfer."""
    listed: list[dict[str, object]] = [{"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}}]
    for step in range(3):
        ready, agreed, start, end = (1000 * (time + STEP_MS * step) for time in times_ms)
        listed += [
            {"ph": "B", "name": "NEGOTIATE_ALLREDUCE", "ts": ready, "pid": pid},
            {"ph": "X", "name": "1", "ts": ready, "pid": pid, "dur": 0},
            {"ph": "E", "ts": agreed, "pid": pid},
            {"ph": "B", "name": "ALLREDUCE", "ts": agreed, "pid": pid},
            {"ph": "B", "name": "WAIT_FOR_DATA", "ts": agreed, "pid": pid},
            {"ph": "E", "ts": start, "pid": pid},
            {"ph": "B", "name": "MEMCPY_IN_FUSION_BUFFER", "ts": start, "pid": pid},
            {"ph": "E", "ts": start + 1000, "pid": pid},
            {"ph": "B", "name": "GLOO_ALLREDUCE", "ts": start + 1000, "pid": pid},
            {"ph": "E", "ts": end, "pid": pid},
            {"ph": "E", "ts": end, "pid": pid, "args": {"dtype": "float32", "shape": json.dumps(shape)}},
            {"ph": "i", "name": "CYCLE_START", "ts": end, "s": "g"},
        ]
    return listed


def write_timeline(path: Path) -> Path:
    """Write three steps: two gradients that are averaged while a third is computed, and a tensor of no gradient."""
    listed = [
        *events(1, "allreduce.head.weight", [10, 100], (10, 12, 14, 30)),
        *events(2, "allreduce.head.bias", [10], (20, 22, 24, 30)),
        *events(3, "allreduce.stem.weight", [100], (60, 61, 62, 70)),
        *events(4, "allreduce.stop", [1], (0, 99, 99, 99)),
    ]
    path.write_text("[\n" + ",\n".join(json.dumps(event) for event in listed) + "]")
    return path
