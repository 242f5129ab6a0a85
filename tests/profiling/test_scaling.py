"""Reading a Horovod timeline, and the model of training on many GPUs."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from repository import REPOSITORY

from ssd_fast.profiling.scaling import (
    BACKWARD_SHARE,
    CLUSTERS,
    TERMS,
    Gradient,
    allreduce_time,
    change_cluster,
    measure,
    parse_run,
    read_timeline,
    step_time,
    term_costs,
)

STEP_MS = 100
C4140 = CLUSTERS["c4140"]
# without what is not asked for: agreement takes no time, and is looked for all the time
IDEAL = C4140._replace(message_s=0.0, cycle_s=1e-9, unevenness=0.0)


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


@pytest.fixture
def timeline(tmp_path: Path) -> Path:
    """Two gradients averaged together while a third is still being computed; and what is no gradient."""
    path = tmp_path / "timeline.json"
    listed = [
        *events(1, "allreduce.head.weight", [10, 100], (10, 12, 14, 30)),
        *events(2, "allreduce.head.bias", [10], (20, 22, 24, 30)),
        *events(3, "allreduce.stem.weight", [100], (60, 61, 62, 70)),
        *events(4, "allreduce.stop", [1], (0, 99, 99, 99)),
    ]
    path.write_text("[\n" + ",\n".join(json.dumps(event) for event in listed) + "]")
    return path


def test_a_timeline_shows_buckets_waiting_and_overlap(timeline: Path) -> None:
    steps = read_timeline(timeline)
    assert [len(step) for step in steps] == [3, 3]  # the first one is left out
    measured = measure(steps)
    assert (measured.num_steps, measured.bytes, measured.num_buckets) == (2, 4 * 1110, 2)
    assert measured.largest_bucket_bytes == 4 * 1010
    seconds = (measured.window_s, measured.wait_s, measured.transfer_s, measured.exposed_s)
    assert seconds == pytest.approx((0.050, 0.002, 0.016 + 0.008, 0.009))
    assert measured.hidden == pytest.approx(16 / 24)  # agreed on the last gradient at 61
    assert [gradient.num_elements for gradient in measured.gradients] == [1000, 10, 100]
    assert [gradient.ready for gradient in measured.gradients] == pytest.approx([0, 0.2, 1])


@pytest.mark.parametrize("end", [",", ', {"ph": "B", "name": "ALLRED', ""])
def test_the_timeline_of_a_killed_run_is_read(timeline: Path, end: str) -> None:
    whole = read_timeline(timeline)
    timeline.write_text(timeline.read_text()[:-1] + end)
    assert read_timeline(timeline) == whole


def test_a_step_that_was_cut_off_is_left_out(timeline: Path) -> None:
    whole = read_timeline(timeline)
    content = json.loads(timeline.read_text())
    end_of_step_3 = next(i for i in reversed(range(len(content))) if content[i].get("pid") == 3)
    timeline.write_text(json.dumps(content[:end_of_step_3]))
    assert read_timeline(timeline) == whole[:1]


@pytest.mark.parametrize(
    "content", ["", "no JSON", "[1, 2]", "{}", "[]", '[{"ph": "i", "name": "CYCLE_START", "ts": 1}]']
)
def test_what_is_no_timeline_of_training_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "file.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"file\.json: expected a Horovod timeline"):
        read_timeline(path)


@pytest.mark.parametrize("groups", [None, 2])
def test_a_timeline_written_by_horovod_is_read(tmp_path: Path, groups: int | None) -> None:
    pytest.importorskip("horovod", reason="make horovod")
    (tmp_path / "ranks.py").write_text(
        "import time, horovod.torch as hvd, torch\n"
        "hvd.init()\n"
        "model = torch.nn.Sequential(torch.nn.Linear(50, 40), torch.nn.ReLU(), torch.nn.Linear(40, 3))\n"
        "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "names = model.named_parameters()\n"
        f"optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=names, groups={groups})\n"
        "for _ in range(40):\n"
        "    model(torch.ones(2, 50)).sum().backward()\n"
        "    optimizer.step()\n"
        "    optimizer.zero_grad()\n"
        "    time.sleep(0.05)\n"  # at its end Horovod drops what its writer has not come to
    )
    path = tmp_path / "timeline.json"
    horovodrun = Path(sys.executable).with_name("horovodrun")
    command = [horovodrun, "-np", "2", "--gloo", "--timeline-filename", path, sys.executable, tmp_path / "ranks.py"]
    subprocess.run([*map(str, command)], check=True, capture_output=True, timeout=120)
    steps = read_timeline(path)
    assert 5 <= len(steps) <= 39  # of 39 after the first
    for step in steps:
        assert sorted(transfer.bytes for transfer in step) == [4 * 3, 4 * 40, 4 * 120, 4 * 2000]
        assert all(t.ready_s <= t.agreed_s <= t.start_s <= t.end_s for t in step)


def test_allreduce_is_the_better_of_ring_and_tree() -> None:
    size, speed, node, network = 80e6, 12e9, 4e-6, 14e-6
    ring = 2 * 15 / 16 * size / speed + 6 * network + 24 * node
    assert allreduce_time(C4140, 16, size) == pytest.approx(8.4e-6 + ring)
    tree = 2 * 1e3 / 0.92 / speed + 2 * (3 * node + 8 * network)
    assert allreduce_time(C4140, 1024, 1e3) == pytest.approx(8.4e-6 + tree)
    assert allreduce_time(C4140, 4, size) == pytest.approx(8.4e-6 + 2 * 3 / 4 * size / 120e9 + 6 * node)


def test_one_gpu_waits_for_nobody() -> None:
    assert step_time(C4140, 1, 120, [Gradient(10**9, 1.0)], bytes_per_element=4) == pytest.approx(0.005 + 120 / 590)


@pytest.mark.parametrize("bytes_per_element", [2, 4])
def test_what_is_ready_last_is_waited_for_and_what_is_ready_first_is_not(bytes_per_element: int) -> None:
    compute = 0.005 + 56 / 590
    first, last = Gradient(10**7, 0.0), Gradient(10**7, 1.0)
    transfer = allreduce_time(IDEAL, 16, bytes_per_element * 10**7)
    assert transfer < BACKWARD_SHARE * compute
    for gradients, exposed in (([first], 0), ([last], transfer), ([first, last], transfer)):
        seconds = step_time(IDEAL, 16, 56, gradients, bytes_per_element=bytes_per_element)
        assert seconds == pytest.approx(compute + exposed, rel=1e-6)


def test_horovod_looks_for_gradients_once_per_cycle_and_then_agrees() -> None:
    gradients = [Gradient(1, 1.0)]
    ideal = step_time(IDEAL, 16, 56, gradients, bytes_per_element=4)
    with_cycle = step_time(IDEAL._replace(cycle_s=0.010), 16, 56, gradients, bytes_per_element=4)
    assert with_cycle - ideal == pytest.approx(0.010 / 2, rel=0.1)  # half a cycle on average
    agreement = 2 * 15 * 1e-3  # longer than a cycle: it sets the pace
    with_agreement = step_time(IDEAL._replace(message_s=1e-3), 16, 56, gradients, bytes_per_element=4)
    assert with_agreement - ideal == pytest.approx(1.5 * agreement, rel=0.1)


def test_more_gpus_never_make_a_step_shorter() -> None:
    gradients = [Gradient(200_000, i / 100) for i in range(101)]
    for cluster in CLUSTERS.values():
        seconds = [step_time(cluster, 2**n, 24, gradients, bytes_per_element=4) for n in range(11)]
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
    costs = term_costs(C4140._replace(**changes), 64, 24, gradients, bytes_per_element=4)  # type: ignore[arg-type]
    assert set(costs) == set(TERMS)
    assert max(costs, key=costs.__getitem__) == term


def test_clusters_do_on_one_node_what_was_published() -> None:
    # gradients as fast as they come: on one node their transfer hardly matters
    gradients = [Gradient(200_000, i / 100) for i in range(101)]
    for name, num_gpus, images_per_s in (("c4140", 4, 2281), ("dgx_a100", 8, 9819)):
        (batch_size,) = (batch for gpus, batch in CLUSTERS[name].runs if gpus == num_gpus)
        seconds = step_time(CLUSTERS[name], num_gpus, batch_size, gradients, bytes_per_element=4)
        assert num_gpus * batch_size / seconds == pytest.approx(images_per_s, rel=0.01)


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


def test_the_command_prints_what_is_measured_what_is_assumed_and_a_table(timeline: Path) -> None:
    def run(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ssd_fast", "scaling", "--timeline", str(timeline), *options]
        return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)

    done = run("--cluster", "h200", "--run", "1024x2", "--fp16-compression")
    assert done.returncode == 0, done.stderr
    assert "measured in 2 steps" in done.stdout
    assert "3300 images/s" in done.stdout
    assert "2 bytes per gradient element" in done.stdout
    (line,) = (line for line in done.stdout.splitlines() if line.startswith(" 1,024 "))
    seconds = step_time(CLUSTERS["h200"], 1024, 2, measure(read_timeline(timeline)).gradients, bytes_per_element=2)
    assert math.isclose(float(line.split()[3]), 1e3 * seconds, abs_tol=0.01)
    refused = run("--cluster", "cray")
    assert (refused.returncode, refused.stderr) == (1, "error: --cluster cray: expected one of c4140, dgx_a100, h200\n")
