"""The model of training on many GPUs."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
from horovod_events import write_timeline
from repository import REPOSITORY

from ssd_fast.profiling.horovod_timeline import Gradient, measure, read_timeline
from ssd_fast.profiling.scaling import (
    BACKWARD_SHARE,
    CLUSTERS,
    TERMS,
    Run,
    allreduce_time,
    change_cluster,
    load_cluster,
    parse_run,
    step_time,
    term_costs,
)

RECIPES = REPOSITORY / "configs"
C4140 = load_cluster("c4140", RECIPES)
# without what is not asked for: agreement takes no time, and gradients are looked for all the time
IDEAL = C4140._replace(message_s=0.0, cycle_s=1e-9, unevenness=0.0)


def test_allreduce_is_the_better_of_ring_and_tree() -> None:
    size, speed, node, network = 80e6, 12e9, 4e-6, 14e-6
    ring = 2 * 15 / 16 * size / speed + 6 * network + 24 * node
    assert allreduce_time(C4140, 16, size) == pytest.approx(8.4e-6 + ring)
    tree = 2 * 1e3 / 0.92 / speed + 2 * (3 * node + 8 * network)
    assert allreduce_time(C4140, 1024, 1e3) == pytest.approx(8.4e-6 + tree)
    assert allreduce_time(C4140, 4, size) == pytest.approx(8.4e-6 + 2 * 3 / 4 * size / 120e9 + 6 * node)


def test_one_gpu_waits_for_nobody() -> None:
    assert step_time(C4140, Run(1, 120), [Gradient(10**9, 1.0)], bytes_per_element=4) == pytest.approx(
        0.005 + 120 / 590
    )


@pytest.mark.parametrize("bytes_per_element", [2, 4])
def test_what_is_ready_last_is_waited_for_and_what_is_ready_first_is_not(bytes_per_element: int) -> None:
    compute = 0.005 + 56 / 590
    first, last = Gradient(10**7, 0.0), Gradient(10**7, 1.0)
    transfer = allreduce_time(IDEAL, 16, bytes_per_element * 10**7)
    assert transfer < BACKWARD_SHARE * compute
    for gradients, exposed in (([first], 0), ([last], transfer), ([first, last], transfer)):
        seconds = step_time(IDEAL, Run(16, 56), gradients, bytes_per_element=bytes_per_element)
        assert seconds == pytest.approx(compute + exposed, rel=1e-6)


def test_horovod_looks_for_gradients_once_per_cycle_and_then_agrees() -> None:
    gradients = [Gradient(1, 1.0)]
    ideal = step_time(IDEAL, Run(16, 56), gradients, bytes_per_element=4)
    with_cycle = step_time(IDEAL._replace(cycle_s=0.010), Run(16, 56), gradients, bytes_per_element=4)
    assert with_cycle - ideal == pytest.approx(0.010 / 2, rel=0.1)  # half a cycle on average
    agreement = 2 * 15 * 1e-3  # longer than a cycle: it sets the pace
    with_agreement = step_time(IDEAL._replace(message_s=1e-3), Run(16, 56), gradients, bytes_per_element=4)
    assert with_agreement - ideal == pytest.approx(1.5 * agreement, rel=0.1)


def test_more_gpus_never_make_a_step_shorter() -> None:
    gradients = [Gradient(200_000, i / 100) for i in range(101)]
    for name in CLUSTERS:
        cluster = load_cluster(name, RECIPES)
        seconds = [step_time(cluster, Run(2**n, 24), gradients, bytes_per_element=4) for n in range(11)]
        assert seconds == sorted(seconds)


@pytest.mark.parametrize(
    ("term", "changes"),
    [
        ("few images", {"batch_independent_s": 0.5}),
        ("bandwidth", {"network_bytes_per_s": 1e8}),
        ("latency", {"network_latency_s": 0.1}),
        ("agreement", {"message_s": 0.01}),
        ("uneven ranks", {"unevenness": 0.5}),
    ],
)
def test_the_term_that_was_made_worse_is_the_one_that_limits(term: str, changes: dict[str, float]) -> None:
    gradients = [Gradient(200_000, i / 100) for i in range(101)]
    costs = term_costs(C4140._replace(**changes), Run(64, 24), gradients, bytes_per_element=4)  # type: ignore[arg-type]
    assert set(costs) == set(TERMS)
    assert max(costs, key=costs.__getitem__) == term


def test_clusters_do_on_one_node_what_was_published() -> None:
    # gradients as fast as they come: on one node their transfer hardly matters
    gradients = [Gradient(200_000, i / 100) for i in range(101)]
    for name, num_gpus, images_per_s in (("c4140", 4, 2281), ("dgx_a100", 8, 9819)):
        cluster = load_cluster(name, RECIPES)
        run = cluster.runs[0]
        assert run.num_gpus == num_gpus
        seconds = step_time(cluster, run, gradients, bytes_per_element=4)
        assert num_gpus * run.batch_size / seconds == pytest.approx(images_per_s, rel=0.01)


def test_runs_are_those_of_the_recipes(tmp_path: Path) -> None:
    assert C4140.gpus_per_node == 4
    assert C4140.runs == ((4, 120), (8, 120), (16, 56), (32, 32), (64, 24), (1024, 2))
    assert [load_cluster(name, RECIPES).runs[0] for name in ("dgx_a100", "h200")] == [(8, 114), (8, 128)]
    with pytest.raises(ValueError, match=r"--recipes .*: expected \*C4140\.toml in it"):
        load_cluster("c4140", tmp_path)


def test_figures_are_replaced_by_name() -> None:
    changed = change_cluster(C4140, ["images_per_s=650", "gpus_per_node=2"])
    assert changed == C4140._replace(images_per_s=650.0, gpus_per_node=2)
    for change in ("images_per_s", "images_per_s=fast", "runs=3", "name=x", "speed=1", "message_s=-1", "message_s=nan"):
        with pytest.raises(ValueError, match=f"--assume {change}: expected .*images_per_s=590"):
            change_cluster(C4140, [change])


def test_runs_are_gpus_times_images() -> None:
    assert parse_run("64x24") == (64, 24)
    for text in ("64", "64x", "x24", "0x24", "64x0", "64x-2", "64x24x2"):
        with pytest.raises(ValueError, match=f"--run {text}: expected"):
            parse_run(text)


def test_the_command_prints_what_is_measured_what_is_assumed_and_a_table(tmp_path: Path) -> None:
    timeline = write_timeline(tmp_path / "timeline.json")

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ssd_fast", "scaling", "--timeline", str(timeline), *options]
        return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)

    done = run("--cluster", "h200", "--run", "1024x2", "--fp16-compression")
    assert done.returncode == 0, done.stderr
    assert "measured in 2 steps" in done.stdout
    assert "3300 images/s" in done.stdout
    assert "2 bytes per gradient element" in done.stdout
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("1,024 x 2 "))
    gradients = measure(read_timeline(timeline)).gradients
    seconds = step_time(load_cluster("h200", RECIPES), Run(1024, 2), gradients, bytes_per_element=2)
    assert math.isclose(float(line.split()[4]), 1e3 * seconds, abs_tol=0.01)
    refused = run("--cluster", "cray")
    assert (refused.returncode, refused.stderr) == (1, "error: --cluster cray: expected one of c4140, dgx_a100, h200\n")
