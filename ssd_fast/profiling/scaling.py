"""A model of training on many GPUs: the images per second to expect, and the term that limits them.

Measured: from a Horovod timeline, the size of each gradient and when within the backward pass it is ready.
Read: from the recipes, the nodes, GPUs and batch sizes of a cluster.
Assumed: everything else about a cluster, in `Cluster`.
`step_time` puts them together. Gradients become ready one after another. Once per cycle Horovod looks for them, all
ranks agree on the ready ones, and NCCL averages these as one bucket while the backward pass goes on. The ranks wait for
what is left after it.
"""

import math
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from statistics import NormalDist, fmean
from typing import Any, NamedTuple

from ssd_fast.config.recipe import load_config
from ssd_fast.profiling.horovod_timeline import Gradient, Measured, measure, read_timeline
from ssd_fast.tables import Row, Table, format_pairs, format_table

BACKWARD_SHARE = 63.03 / 94.75  # of the operations of a training step at 300x300
_NUM_PHASES = 16


class Run(NamedTuple):
    """A training run: number of GPUs, and images per GPU in a step."""

    num_gpus: int
    batch_size: int


class Cluster(NamedTuple):
    """Nodes, their links and their GPUs, and the runs on them.

    images_per_s: of a GPU, beside batch_independent_s, the part of a step that launches kernels and updates weights.
    node_bytes_per_s: a ring of all GPUs of a node. network_bytes_per_s: a node, all of its ports.
    base_latency_s: of an allreduce. node_latency_s, network_latency_s: of each of its hops.
    message_s: one message between two ranks by TCP, which is how ranks agree (Gloo).
    cycle_s: Horovod looks for gradients that often. unevenness: standard deviation of a rank's time, as a share of it.
    """

    name: str
    gpus_per_node: int
    runs: tuple[Run, ...]
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


class _Assumed(NamedTuple):
    """Assumptions about a cluster. recipes: pattern of their file names. more_runs: runs that have no recipe."""

    recipes: str
    more_runs: tuple[Run, ...]
    images_per_s: float
    node_bytes_per_s: float
    network_bytes_per_s: float


# Links and latencies are those of NCCL's own cost model (src/graph/topo.h, tuning.cc): 20 to 20.6 GB/s for each NVLink
# of a GPU, 12 for 100 Gbit/s of network. docs/scaling.md explains the other figures.
_LARGE, _LARGEST = Run(64, 24), Run(1024, 2)
_ASSUMED = {
    "c4140": _Assumed("*C4140.toml", (_LARGEST,), 590.0, 6 * 20e9, 12e9),
    "dgx_a100": _Assumed("dgx_a100.toml", (_LARGE, _LARGEST), 1320.0, 12 * 20e9, 8 * 24e9),
    "h200": _Assumed("h200.toml", (_LARGE, _LARGEST), 3300.0, 18 * 20.6e9, 8 * 48e9),
}
CLUSTERS = tuple(_ASSUMED)

# The cost of each term of the model is found by leaving it out.
TERMS: dict[str, dict[str, float]] = {
    "few images": {"batch_independent_s": 0},
    "bandwidth": {"node_bytes_per_s": math.inf, "network_bytes_per_s": math.inf},
    "latency": {"base_latency_s": 0, "node_latency_s": 0, "network_latency_s": 0},
    "agreement": {"message_s": 0},
    "uneven ranks": {"unevenness": 0},
}


def load_cluster(name: str, recipes: Path) -> Cluster:
    """Return one of CLUSTERS with the nodes, GPUs and batch sizes of its recipes.

    recipes: folder of the recipes. Raises ValueError if the name is unknown or if there are no recipes.
    """
    if name not in _ASSUMED:
        raise ValueError(f"--cluster {name}: expected one of {', '.join(CLUSTERS)}")
    assumed = _ASSUMED[name]
    runs, gpus_per_node = [], 0
    for config in map(load_config, recipes.glob(assumed.recipes)):
        if config.system.nodes and config.system.gpus_per_node:
            gpus_per_node = config.system.gpus_per_node
            runs.append(Run(config.system.nodes * gpus_per_node, config.training.batch_size))
    if not runs:
        raise ValueError(
            f"--recipes {recipes}: expected {assumed.recipes} in it, with system.nodes and system.gpus_per_node"
        )
    return Cluster(
        name=name,
        gpus_per_node=gpus_per_node,
        runs=(*sorted(runs), *assumed.more_runs),
        images_per_s=assumed.images_per_s,
        node_bytes_per_s=assumed.node_bytes_per_s,
        network_bytes_per_s=assumed.network_bytes_per_s,
    )


def change_cluster(cluster: Cluster, changes: Iterable[str]) -> Cluster:
    """Return the cluster with some figures replaced. changes: "figure=value" each."""
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


def parse_run(text: str) -> Run:
    """Return the run of a text like 64x24: GPUs x images per GPU."""
    num_gpus, _, batch_size = text.partition("x")
    if not (num_gpus.isdecimal() and batch_size.isdecimal() and int(num_gpus) and int(batch_size)):
        raise ValueError(f"--run {text}: expected GPUs x images per GPU, like 64x24")
    return Run(int(num_gpus), int(batch_size))


def allreduce_time(cluster: Cluster, num_gpus: int, num_bytes: float) -> float:
    """Seconds to average a bucket over all GPUs: the faster one of NCCL's ring and tree, by NCCL's own formulas.

    A tree reaches 92% of a ring's bandwidth. The protocol is "Simple", that of large buckets.
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


def step_time(cluster: Cluster, run: Run, gradients: Sequence[Gradient], *, bytes_per_element: int) -> float:
    """Seconds of a training step, on average. gradients: sorted, as `horovod_timeline.measure` returns them."""
    num_gpus, batch_size = run
    compute_s = cluster.batch_independent_s + batch_size / cluster.images_per_s
    if num_gpus == 1:
        return compute_s
    slowest = NormalDist().inv_cdf((num_gpus - 0.375) / (num_gpus + 0.25))  # expected of so many (Blom)
    compute_s *= 1 + cluster.unevenness * slowest
    backward_s = BACKWARD_SHARE * compute_s
    agreement_s = 2 * (num_gpus - 1) * cluster.message_s  # Gloo passes its few bytes around a ring, twice
    cycle_s = max(cluster.cycle_s, agreement_s)

    def exposed(phase: float) -> float:
        """Time left after a backward pass that begins at a fraction of a cycle."""
        idle_s = 0.0  # NCCL is idle from then on
        for cycle, bucket in groupby(
            gradients, lambda gradient: math.ceil(gradient.ready * backward_s / cycle_s + phase)
        ):
            num_bytes = bytes_per_element * sum(gradient.num_elements for gradient in bucket)
            begun_s = (cycle - phase) * cycle_s + agreement_s
            idle_s = max(idle_s, begun_s) + allreduce_time(cluster, num_gpus, num_bytes)
        return max(0.0, idle_s - backward_s)

    return compute_s + fmean(exposed(phase / _NUM_PHASES) for phase in range(_NUM_PHASES))


def term_costs(
    cluster: Cluster, run: Run, gradients: Sequence[Gradient], *, bytes_per_element: int
) -> dict[str, float]:
    """Seconds by which a step would be shorter without each of TERMS."""

    def seconds(changes: dict[str, Any]) -> float:
        return step_time(cluster._replace(**changes), run, gradients, bytes_per_element=bytes_per_element)

    return {term: seconds({}) - seconds(changes) for term, changes in TERMS.items()}


def format_scaling(timeline: Path, cluster: Cluster, runs: Sequence[Run], *, bytes_per_element: int) -> str:
    """Text for a terminal: measured and assumed figures, and a row for each run."""
    measured = measure(read_timeline(timeline))
    return "\n\n".join(
        (
            f"measured in {measured.num_steps} steps (medians):\n" + format_pairs(_measured_pairs(measured)),
            f"assumed of {cluster.name}:\n" + format_pairs(_assumed_pairs(cluster, bytes_per_element)),
            format_table(_runs_table(cluster, runs, measured.gradients, bytes_per_element)),
        )
    )


def _measured_pairs(measured: Measured) -> list[tuple[str, str]]:
    return [
        (
            "gradients",
            f"{len(measured.gradients)}, {measured.bytes / 1e6:.1f} MB, joined into {measured.num_buckets:g} buckets, "
            f"the largest of {measured.largest_bucket_bytes / 1e6:.1f} MB",
        ),
        ("first to last gradient", f"{1e3 * measured.window_s:.1f} ms"),
        ("ready on one rank to agreed by all", f"{1e3 * measured.wait_s:.1f} ms"),
        (
            "transfers",
            f"{1e3 * measured.transfer_s:.1f} ms, {measured.hidden:.1%} of it while gradients were being computed",
        ),
        ("after the last gradient", f"{1e3 * measured.exposed_s:.1f} ms"),
    ]


def _assumed_pairs(cluster: Cluster, bytes_per_element: int) -> list[tuple[str, str]]:
    return [
        (
            "GPUs",
            f"{cluster.gpus_per_node} per node, each {cluster.images_per_s:g} images/s and "
            f"{1e3 * cluster.batch_independent_s:g} ms per step",
        ),
        ("backward", f"{BACKWARD_SHARE:.0%} of a step"),
        ("unevenness of ranks", f"{cluster.unevenness:.0%}"),
        (
            "links",
            f"{cluster.node_bytes_per_s / 1e9:g} GB/s within a node, {cluster.network_bytes_per_s / 1e9:g} GB/s "
            "between nodes",
        ),
        (
            "latency",
            f"{1e6 * cluster.base_latency_s:g} us + {1e6 * cluster.node_latency_s:g} or "
            f"{1e6 * cluster.network_latency_s:g} us per hop",
        ),
        ("Horovod", f"a cycle of {1e3 * cluster.cycle_s:g} ms, {1e6 * cluster.message_s:g} us per message to agree"),
        ("gradients", f"{bytes_per_element} bytes per gradient element"),
    ]


def _runs_table(cluster: Cluster, runs: Iterable[Run], gradients: Sequence[Gradient], bytes_per_element: int) -> Table:
    alone = Run(1, cluster.runs[0].batch_size)
    best = alone.batch_size / step_time(cluster, alone, gradients, bytes_per_element=bytes_per_element)
    rows = []
    for run in runs:
        seconds = step_time(cluster, run, gradients, bytes_per_element=bytes_per_element)
        costs = term_costs(cluster, run, gradients, bytes_per_element=bytes_per_element)
        num_images = run.num_gpus * run.batch_size
        rows.append(
            Row(
                [
                    f"{run.num_gpus:,} x {run.batch_size}",
                    f"{num_images:,}",
                    f"{1e3 * seconds:.2f}",
                    f"{num_images / seconds:,.0f}",
                    f"{num_images / seconds / run.num_gpus / best:.1%}",
                    *(f"{1e3 * cost:.2f}" for cost in costs.values()),
                    max(costs, key=costs.__getitem__),
                ]
            )
        )
    columns = ("GPUs x batch", "global batch", "step ms", "images/s", "efficiency", *TERMS, "largest term")
    note = (
        f"efficiency: images/s per GPU, of those of a GPU alone with {alone.batch_size} images per step\n"
        "terms: ms by which a step would be shorter without the term (they overlap)"
    )
    return Table("Runs", columns, rows, note)
