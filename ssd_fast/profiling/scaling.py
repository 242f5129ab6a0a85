"""What training on many GPUs can be expected to reach, and what holds it back.

Measured: from a Horovod timeline, how many gradients of which size become ready when within the backward pass, how they
were joined into buckets, and how much of their transfer the backward pass hid.
Assumed: everything about a cluster, in `Cluster`. `step_time` puts the two together: gradients become ready one after
another, Horovod looks for them once per cycle, all ranks agree on what is ready, and NCCL averages that as one bucket
while the backward pass goes on; what is left after it is waited for.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from statistics import NormalDist, fmean, median
from typing import Any, NamedTuple

BACKWARD_SHARE = 63.03 / 94.75  # of the operations of a training step at 300x300
_NUM_PHASES = 16
_OF_GRADIENT = re.compile(r"(grouped_)?allreduce\..+\.(weight|bias)(_\d+of\d+)?")  # of a group, the first one's name
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
    """ready: when it is there, as a fraction of the time between the step's first and last gradient."""

    num_elements: int
    ready: float


class Measured(NamedTuple):
    """What a timeline shows; times and counts are medians over its steps.

    buckets: gradients that were averaged together. window_s: from the first gradient to the last.
    wait_s: from ready on one rank to agreed, median of all gradients; the ranks' being uneven is part of it.
    transfer_s: of all buckets. hidden: share of transfer_s before the last gradient was agreed on.
    exposed_s: from then to the end of the last bucket. gradients: sorted by their fraction.
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


class Cluster(NamedTuple):
    """Nodes, their links and their GPUs, and what is run on them.

    runs: numbers of GPUs and images per GPU. batch_independent_s: of a step, to launch kernels and to update weights;
    the rest of it is images / images_per_s.
    node_bytes_per_s: what a ring of all GPUs of a node carries. network_bytes_per_s: of a node, all of its ports.
    base_latency_s: of an allreduce. node_latency_s, network_latency_s: of each of its hops.
    message_s: one message between two ranks by TCP, which is how ranks agree (Gloo).
    cycle_s: Horovod looks for gradients that often. unevenness: standard deviation of a rank's time, as a share of it.
    """

    name: str
    gpus_per_node: int
    runs: tuple[tuple[int, int], ...]
    images_per_s: float
    node_bytes_per_s: float
    network_bytes_per_s: float
    batch_independent_s: float = 5e-3
    base_latency_s: float = 8.4e-6
    node_latency_s: float = 4e-6
    network_latency_s: float = 14e-6
    message_s: float = 25e-6
    cycle_s: float = 1e-3
    unevenness: float = 0.01


# Links and latencies as NCCL's own cost model counts them (src/graph/topo.h, tuning.cc): 20 to 20.6 GB/s for each
# NVLink of a GPU, 12 for 100 Gbit/s of network. The other figures are explained in docs/scaling.md.
CLUSTERS = {
    cluster.name: cluster
    for cluster in (
        Cluster("c4140", 4, ((4, 120), (8, 120), (16, 56), (32, 32), (64, 24), (1024, 2)), 590.0, 6 * 20e9, 12e9),
        Cluster("dgx_a100", 8, ((8, 114), (64, 24), (1024, 2)), 1320.0, 12 * 20e9, 8 * 24e9),
        Cluster("h200", 8, ((8, 128), (64, 24), (1024, 2)), 3300.0, 18 * 20.6e9, 8 * 48e9),
    )
}

# What each term of the model costs is found by leaving it out.
TERMS: dict[str, dict[str, float]] = {
    "few images": {"batch_independent_s": 0},
    "bandwidth": {"node_bytes_per_s": math.inf, "network_bytes_per_s": math.inf},
    "latency": {"base_latency_s": 0, "node_latency_s": 0, "network_latency_s": 0},
    "agreement": {"message_s": 0},
    "uneven ranks": {"unevenness": 0},
}


def read_timeline(path: Path) -> list[list[Transfer]]:
    """The gradients of every complete step but the first, in which Horovod does not know them yet.

    path: what HOROVOD_TIMELINE named, also of a run that was killed.
    Raises ValueError if it is not such a file, or if it has no two steps with gradients of parameters.
    """
    transfers: dict[str, list[Transfer]] = defaultdict(list)
    for name, activities in _activities(_read_events(path)):
        if _OF_GRADIENT.fullmatch(name):
            transfers[name].extend(_transfers(name, activities))
    num_steps = min((len(steps) for steps in transfers.values()), default=0)
    if num_steps < 2:
        raise ValueError(f"{path}: expected a Horovod timeline of at least 2 training steps, found {num_steps}")
    return [[steps[step] for steps in transfers.values()] for step in range(1, num_steps)]


def measure(steps: Sequence[Sequence[Transfer]]) -> Measured:
    """Medians over the steps of a timeline."""
    buckets = [_buckets(step) for step in steps]
    first = [min(t.ready_s for t in step) for step in steps]
    window = [max(t.ready_s for t in step) - start for step, start in zip(steps, first, strict=True)]
    agreed = [max(t.agreed_s for t in step) for step in steps]
    busy = [sum(end - start for start, end, _ in step) for step in buckets]
    hidden = [
        sum(max(0.0, min(end, last) - start) for start, end, _ in step)
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
        largest_bucket_bytes=median(max(size for _, _, size in step) for step in buckets),
        window_s=median(window),
        wait_s=median(t.agreed_s - t.ready_s for step in steps for t in step),
        transfer_s=median(busy),
        hidden=median(part / whole for part, whole in zip(hidden, busy, strict=True)),
        exposed_s=median(max(t.end_s for t in step) - last for step, last in zip(steps, agreed, strict=True)),
        gradients=tuple(sorted(gradients, key=lambda gradient: gradient.ready)),
    )


def allreduce_time(cluster: Cluster, num_gpus: int, num_bytes: float) -> float:
    """Seconds to average a bucket over all GPUs: the better one of NCCL's ring and tree, by NCCL's own formulas.

    A tree reaches 92% of a ring's bandwidth. Only the protocol "Simple" is counted, which is that of large buckets.
    """
    num_nodes = math.ceil(num_gpus / cluster.gpus_per_node)
    speed = cluster.node_bytes_per_s
    if num_nodes > 1:
        speed = min(speed, cluster.network_bytes_per_s)
    hops, network_hops = 2 * (num_gpus - 1), 2 * (num_nodes - 1)
    ring_latency = (hops - network_hops) * cluster.node_latency_s + network_hops * cluster.network_latency_s
    in_node = num_gpus / num_nodes - 1
    tree_latency = 2 * (in_node * cluster.node_latency_s + math.log2(num_nodes) * cluster.network_latency_s)
    ring = hops / num_gpus * num_bytes / speed + ring_latency
    tree = 2 * num_bytes / (0.92 * speed) + tree_latency
    return cluster.base_latency_s + min(ring, tree)


def step_time(
    cluster: Cluster, num_gpus: int, batch_size: int, gradients: Sequence[Gradient], *, bytes_per_element: int
) -> float:
    """Seconds of a training step, on average; gradients: sorted, as `measure` gives them."""
    compute_s = cluster.batch_independent_s + batch_size / cluster.images_per_s
    if num_gpus == 1:
        return compute_s
    slowest = NormalDist().inv_cdf((num_gpus - 0.375) / (num_gpus + 0.25))  # of so many, expected (Blom)
    compute_s *= 1 + cluster.unevenness * slowest
    backward_s = BACKWARD_SHARE * compute_s
    agreement_s = 2 * (num_gpus - 1) * cluster.message_s  # Gloo passes its few bytes round a ring, twice
    cycle_s = max(cluster.cycle_s, agreement_s)

    def exposed(phase: float) -> float:
        """What is left after the backward pass, if that begins at a fraction of a cycle."""
        idle_s = 0.0  # when NCCL is
        for cycle, bucket in groupby(
            gradients, lambda gradient: math.ceil(gradient.ready * backward_s / cycle_s + phase)
        ):
            num_bytes = bytes_per_element * sum(gradient.num_elements for gradient in bucket)
            begun_s = (cycle - phase) * cycle_s + agreement_s
            idle_s = max(idle_s, begun_s) + allreduce_time(cluster, num_gpus, num_bytes)
        return max(0.0, idle_s - backward_s)

    return compute_s + fmean(exposed(phase / _NUM_PHASES) for phase in range(_NUM_PHASES))


def term_costs(
    cluster: Cluster, num_gpus: int, batch_size: int, gradients: Sequence[Gradient], *, bytes_per_element: int
) -> dict[str, float]:
    """Seconds by which a step would be shorter without each of TERMS."""

    def seconds(changes: dict[str, Any]) -> float:
        changed = cluster._replace(**changes)
        return step_time(changed, num_gpus, batch_size, gradients, bytes_per_element=bytes_per_element)

    return {term: seconds({}) - seconds(changes) for term, changes in TERMS.items()}


def format_measured(measured: Measured) -> str:
    """What was measured, a line each."""
    return "\n".join(
        (
            f"measured in {measured.num_steps} steps (medians):",
            f"  {len(measured.gradients)} gradients, {measured.bytes / 1e6:.1f} MB, joined into "
            f"{measured.num_buckets:g} buckets, the largest of {measured.largest_bucket_bytes / 1e6:.1f} MB",
            f"  first to last gradient {1e3 * measured.window_s:.1f} ms; "
            f"ready on one rank to agreed by all {1e3 * measured.wait_s:.1f} ms",
            f"  transfers {1e3 * measured.transfer_s:.1f} ms, {measured.hidden:.1%} of it while gradients were being "
            f"computed; after the last gradient {1e3 * measured.exposed_s:.1f} ms",
        )
    )


def format_assumed(cluster: Cluster, *, bytes_per_element: int) -> str:
    """What is assumed, a line each."""
    return "\n".join(
        (
            f"assumed of {cluster.name}:",
            f"  {cluster.gpus_per_node} GPUs per node, each {cluster.images_per_s:g} images/s and "
            f"{1e3 * cluster.batch_independent_s:g} ms per step; backward {BACKWARD_SHARE:.0%} of it; "
            f"ranks uneven by {cluster.unevenness:.0%}",
            f"  {cluster.node_bytes_per_s / 1e9:g} GB/s within a node, {cluster.network_bytes_per_s / 1e9:g} GB/s "
            f"between nodes; latency {1e6 * cluster.base_latency_s:g} us + {1e6 * cluster.node_latency_s:g} or "
            f"{1e6 * cluster.network_latency_s:g} us per hop",
            f"  Horovod's cycle {1e3 * cluster.cycle_s:g} ms, {1e6 * cluster.message_s:g} us per message to agree; "
            f"{bytes_per_element} bytes per gradient element",
        )
    )


def format_table(
    cluster: Cluster, runs: Iterable[tuple[int, int]], gradients: Sequence[Gradient], *, bytes_per_element: int
) -> str:
    """A line per run, and what the columns mean."""
    alone = cluster.runs[0][1]
    best = alone / step_time(cluster, 1, alone, gradients, bytes_per_element=bytes_per_element)
    lines = ["  GPUs   batch  global  step ms   images/s  efficiency" + "".join(f"{term:>14}" for term in TERMS)]
    for num_gpus, batch_size in runs:
        seconds = step_time(cluster, num_gpus, batch_size, gradients, bytes_per_element=bytes_per_element)
        costs = term_costs(cluster, num_gpus, batch_size, gradients, bytes_per_element=bytes_per_element)
        images_per_s = num_gpus * batch_size / seconds
        lines.append(
            f"{num_gpus:6,} {batch_size:7} {num_gpus * batch_size:7,} {1e3 * seconds:8.2f} {images_per_s:10,.0f} "
            f"{images_per_s / num_gpus / best:11.1%}"
            + "".join(f"{1e3 * cost:14.2f}" for cost in costs.values())
            + f"  {max(costs, key=costs.__getitem__)}"
        )
    return (
        "\n".join(lines) + f"\nefficiency: images/s per GPU, of those of a GPU alone with {alone} images per step. "
        "Last columns: ms by which a step would\nbe shorter without that term (they overlap), and the largest of them."
    )


def parse_run(text: str) -> tuple[int, int]:
    """GPUs and images per GPU, of a text like 64x24."""
    num_gpus, times, batch_size = text.partition("x")
    if not (times and num_gpus.isdecimal() and batch_size.isdecimal() and int(num_gpus) and int(batch_size)):
        raise ValueError(f"--run {text}: expected GPUs x images per GPU, like 64x24")
    return int(num_gpus), int(batch_size)


def change_cluster(cluster: Cluster, changes: Iterable[str]) -> Cluster:
    """The cluster with some figures replaced; changes: "figure=value" each."""
    figures: dict[str, Any] = {key: old for key, old in cluster._asdict().items() if isinstance(old, int | float)}
    for change in changes:
        figure, _, text = change.partition("=")
        try:
            value = type(figures[figure])(text)
        except (KeyError, ValueError):
            value = -1
        if not 0 <= value < math.inf:
            known = ", ".join(f"{key}={old:g}" for key, old in figures.items())
            raise ValueError(f"--assume {change}: expected a figure and its value, not negative, as in {known}")
        figures[figure] = value
    return cluster._replace(**figures)


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


class _Activity(NamedTuple):
    name: str
    start_s: float
    end_s: float
    arguments: dict[str, str]


def _activities(events: Iterable[dict[str, Any]]) -> Iterator[tuple[str, list[_Activity]]]:
    """Names of tensors, each with what was done with it, in the order in which it ended."""
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


def _buckets(step: Iterable[Transfer]) -> list[tuple[float, float, int]]:
    """Start, end and bytes of what was averaged at the same time, which Horovod does only with what it has joined."""
    buckets: list[tuple[float, float, int]] = []
    for transfer in sorted(step, key=lambda transfer: transfer.start_s):
        start, end, size = transfer.start_s, transfer.end_s, transfer.bytes
        if buckets and start < buckets[-1][1]:
            last_start, last_end, last_size = buckets.pop()
            start, end, size = last_start, max(end, last_end), size + last_size
        buckets.append((start, end, size))
    return buckets
