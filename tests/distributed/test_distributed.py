"""Several processes with Horovod: the result of one, and an end to every way in which one of them may fail.

The ranks are started as horovodrun does it, with Horovod's own rendezvous, but here each can be seen to end.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from distributed_worker import BAD_STEP, CASES
from repository import REPOSITORY
from tiny import assert_same_end, tiny_config

from ssd_fast.checkpoints.checkpoint import BEST, Checkpoint, CheckpointError, load_checkpoint, newest_checkpoint
from ssd_fast.distributed.world import World, _Wire, connect, slurm_variables
from ssd_fast.training.history import read_metrics
from ssd_fast.training.run import INTERRUPTED, train
from ssd_fast.training.scores import read_scores

needs_horovod = pytest.mark.skipif(
    importlib.util.find_spec("horovod") is None, reason="Horovod is not installed (make horovod)"
)
WORKER = [sys.executable, str(REPOSITORY / "tests" / "distributed_worker.py")]
STEPS = 16  # two epochs of eight: two ranks with four images each of 64
TIMEOUT_S = 30
FAIL = f"""
import os, signal, sys, time
import torch
from ssd_fast.config import DistributedConfig
from ssd_fast.distributed.world import connect

with connect(DistributedConfig(timeout_s={TIMEOUT_S})) as world:
    for step in range(100000):
        if step == 20:
            print(time.time(), flush=True)
            if world.rank == world.size - 1:
                if sys.argv[1] == "raise":
                    raise ValueError("a test's own error")
                time.sleep(1000) if sys.argv[1] == "sleep" else os.kill(os.getpid(), signal.SIGSTOP)
        world.average_(torch.ones(1))
"""
EVERY_STEP = "training.checkpoint_every_steps=1"


class Ended(NamedTuple):
    """How a rank ended: exit status, what it wrote, and when it was seen to have ended."""

    status: int
    output: str
    errors: str
    time: float


class Job:
    """Ranks that have been started."""

    def __init__(self, processes: list[subprocess.Popen[str]]) -> None:
        self._processes = processes

    def end_of(self, ranks: Sequence[int] | None = None) -> list[Ended]:
        """Waits for ranks, or for all."""
        ended = []
        for process in self._processes if ranks is None else [self._processes[rank] for rank in ranks]:
            output, errors = process.communicate(timeout=120)
            ended.append(Ended(process.returncode, output, errors, time.time()))
        return ended


def slurm_environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What a task of a Slurm step on one node finds."""
    variables = {"PROCID": rank, "NTASKS": size, "LOCALID": rank, "NODEID": 0, "NNODES": 1, "STEP_TASKS_PER_NODE": size}
    return {
        **{f"SLURM_{name}": str(value) for name, value in variables.items()},
        "SLURMD_NODENAME": "node0",
        "SSD_FAST_RENDEZVOUS": f"127.0.0.1:{port}",
    }


def horovodrun_environment(rank: int, size: int, port: int) -> dict[str, str]:
    return slurm_variables(slurm_environment(rank, size, port))


@contextmanager
def rendezvous() -> Iterator[int]:
    """The port at which ranks may find each other."""
    from horovod.runner.http.http_server import RendezvousServer

    server = RendezvousServer()
    port = server.start()
    server.init([])
    try:
        yield port
    finally:
        server.stop()


@contextmanager
def started(size: int, command: Sequence[str], environment: Any, port: int) -> Iterator[Job]:
    """A job of so many ranks; at its end none of them is left."""
    processes = [
        subprocess.Popen(
            command,
            env={**os.environ, "HOROVOD_GLOO_IFACE": "lo", **environment(rank, size, port)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        yield Job(processes)
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def run_job(size: int, *command: str) -> list[Ended]:
    with rendezvous() as port, started(size, command, horovodrun_environment, port) as job:
        return job.end_of()


# ---- what a launcher says ----


def test_a_process_that_was_started_alone_is_a_world_of_one_without_horovod() -> None:
    code = (
        "import sys; from ssd_fast.config import DistributedConfig; from ssd_fast.distributed.world import connect\n"
        "with connect(DistributedConfig()) as world: assert (world.rank, world.size) == (0, 1)\n"
        "assert 'horovod' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_slurms_variables_become_horovods() -> None:
    environ = {
        "SSD_FAST_RENDEZVOUS": "10.0.0.1:4711",
        "SLURM_PROCID": "5",
        "SLURM_NTASKS": "8",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": "1",
        "SLURM_NNODES": "2",
        "SLURMD_NODENAME": "b",
    }
    with pytest.raises(ValueError, match=r"task 5 of 8 is number 2 on node 1 of 2 .*expected equal blocks; srun --nt"):
        slurm_variables(environ | {"SLURM_LOCALID": "2"})
    variables = slurm_variables(environ)
    names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE")
    assert [variables[f"HOROVOD_{name}"] for name in names] == ["5", "8", "1", "4", "1", "2"]
    assert variables["HOROVOD_HOSTNAME"] == "b"
    assert variables["HOROVOD_GLOO_RENDEZVOUS_ADDR"] == "10.0.0.1"
    assert variables["HOROVOD_GLOO_RENDEZVOUS_PORT"] == "4711"


@pytest.mark.parametrize(
    ("rank", "layout"),
    [(2, {"LOCALID": "2", "NODEID": "0", "STEP_TASKS_PER_NODE": "3,1"}), (1, {"LOCALID": "0", "NODEID": "1"})],
    ids=["unequal", "cyclic"],
)
def test_tasks_that_are_not_in_equal_blocks_are_refused(rank: int, layout: dict[str, str]) -> None:
    environ = slurm_environment(rank, 4, 1) | {"SLURM_NNODES": "2"} | {f"SLURM_{k}": v for k, v in layout.items()}
    with pytest.raises(ValueError, match="expected equal blocks"):
        slurm_variables(environ)
    with pytest.raises(ValueError, match="SLURM_PROCID is not: expected to be started by srun"):
        slurm_variables({"SSD_FAST_RENDEZVOUS": "a:1"})


def test_a_launch_without_horovod_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOROVOD_RANK", "0")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="Horovod is not installed: make horovod"):
        connect(tiny_config().distributed)


# ---- training steps ----


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of two ranks, the results of all cases; they were started as run.slurm starts them."""
    folder = tmp_path_factory.mktemp("cases")
    server = [sys.executable, "-m", "ssd_fast.distributed.world"]
    with subprocess.Popen(server, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as rendezvous_server:
        assert rendezvous_server.stdout is not None
        port = int(rendezvous_server.stdout.readline())
        with started(2, [*WORKER, "cases", str(folder)], slurm_environment, port) as job:
            for ended in job.end_of():
                assert ended.status == 0, ended.errors
    assert rendezvous_server.returncode == 0  # it has ended with its standard input
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """What one process with the whole batch computes."""
    return {name: CASES[name](World()) for name in ("frozen", "live", "bad")}


def assert_close(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        error = (tensor - expected[name]).norm()
        allowed = 10 * tolerance if name.startswith("momentum") else tolerance
        assert error <= allowed * expected[name].norm(), f"{name}: {error:.2g}"


@needs_horovod
def test_two_ranks_with_half_a_batch_each_train_as_one_with_all_of_it(cases: list[Any], alone: Any) -> None:
    losses, expected = (torch.tensor(result["frozen"]["windows"]) for result in (cases[0], alone))
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    assert_close(cases[0]["frozen"]["tensors"], alone["frozen"]["tensors"], 2e-4)


@needs_horovod
def test_live_batch_norm_sees_half_a_batch_on_each_of_two_ranks(cases: list[Any], alone: Any) -> None:
    first = [result["live"]["statistics"][0] for result in (*cases, alone)]
    mean = slice(0, 64)  # of the first layer, whose input does not depend on other layers' statistics
    variance = slice(64, 128)
    torch.testing.assert_close((first[0] + first[1])[mean] / 2, first[2][mean], rtol=1e-4, atol=1e-6)
    assert bool(((first[0] + first[1])[variance] / 2 <= first[2][variance] * 1.001).all())
    assert not torch.equal(first[0], first[1])
    assert torch.equal(cases[0]["live"]["averaged"], cases[1]["live"]["averaged"])
    own = (cases[0]["live"]["statistics"][-1] + cases[1]["live"]["statistics"][-1]) / 2
    torch.testing.assert_close(cases[0]["live"]["averaged"], own)


@needs_horovod
@pytest.mark.parametrize("case", ["frozen", "live", "bad", "fp16", "predivided"])
def test_all_ranks_have_the_same_weights_and_the_same_losses_after_every_step(cases: list[Any], case: str) -> None:
    assert cases[0][case]["digests"] == cases[1][case]["digests"]
    assert len(set(cases[0][case]["digests"])) == 5 - (case == "bad")
    assert str(cases[0][case]["windows"]) == str(cases[1][case]["windows"])


@needs_horovod
def test_a_step_that_is_bad_on_one_rank_is_skipped_by_all(cases: list[Any]) -> None:
    for rank, result in enumerate(cases):
        digests, statistics, windows = (result["bad"][key] for key in ("digests", "statistics", "windows"))
        assert digests[BAD_STEP] == digests[BAD_STEP - 1]
        assert digests[BAD_STEP + 1] != digests[BAD_STEP]
        assert [window[3] for window in windows] == [0, 0, 1, 0, 0]
        assert torch.equal(statistics[BAD_STEP], statistics[BAD_STEP - 1]) == (rank == 1)
        assert bool(torch.isfinite(statistics[-1]).all())


@needs_horovod
def test_gradients_travel_as_float16_or_divided_beforehand_when_asked_to(cases: list[Any]) -> None:
    exact = cases[0]["frozen"]["tensors"]
    assert_close(cases[0]["predivided"]["tensors"], exact, 1e-5)
    assert_close(cases[0]["fp16"]["tensors"], exact, 2e-2)
    assert cases[0]["fp16"]["digests"] != cases[0]["frozen"]["digests"]


@needs_horovod
def test_gradients_in_channels_last_are_averaged_to_the_same_bits_and_keep_their_layout(cases: list[Any]) -> None:
    for result in cases:
        for layout in result["layouts"].values():
            assert all(layout["equal"])
            assert all(layout["strides"])


def test_a_gradient_in_channels_last_goes_on_its_way_without_a_copy() -> None:
    for shape in ((6, 5, 3, 3), (6, 5, 1, 1), (6,)):
        gradient = torch.randn(shape)
        if len(shape) == 4:
            gradient = gradient.to(memory_format=torch.channels_last)
        wire, context = _Wire(None).compress(gradient)
        back = _Wire(None).decompress(wire, context)
        assert wire.is_contiguous()
        assert wire.data_ptr() == back.data_ptr() == gradient.data_ptr()
        assert back.stride() == gradient.stride()


@needs_horovod
def test_what_ranks_tell_each_other_arrives(cases: list[Any]) -> None:
    gathered = [result["collectives"]["gathered"] for result in cases]
    assert [value["rank"] for value in gathered[0]] == [0, 1]
    assert len(gathered[0][1]["ballast"]) == 1000
    assert gathered[1] == []
    assert [result["collectives"]["broadcast"] for result in cases] == ["from 0", "from 0"]
    for result in cases:  # what is read at a step was said at the one before
        assert result["collectives"]["agreed"] == [(0, 0), (0, 0), (1, 1), (0, 2)]


# ---- whole runs ----


def run_ranks(
    size: int, data: Path, output: Path, *overrides: str, resume: bool = False, act: Sequence[object] = (-1, 0, "")
) -> list[Ended]:
    """A run by two ranks or more; act: rank, step and what that rank does in it."""
    place = [str(data), str(output), "resume" if resume else "new", *map(str, act)]
    return run_job(size, *WORKER, "run", *place, *overrides)


@pytest.fixture(scope="module")
def finished(synthetic_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run by two ranks that nothing interrupted."""
    output = tmp_path_factory.mktemp("runs") / "finished"
    for ended in run_ranks(2, synthetic_set, output):
        assert ended.status == 0, ended.errors
    return output


def newest(output: Path) -> Checkpoint:
    checkpoint = newest_checkpoint(output / "checkpoints")
    assert checkpoint is not None
    return checkpoint


@needs_horovod
def test_a_run_of_two_ranks_stopped_killed_and_resumed_ends_as_if_uninterrupted(
    finished: Path, synthetic_set: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    stopped = run_ranks(2, synthetic_set, output, act=(1, 3, "term"))
    assert [ended.status for ended in stopped] == [143, 143]
    assert newest(output).step == 4  # agreed on at the next step
    assert (output / INTERRUPTED).read_text() == "signal 15, step 4\n"

    killed = run_ranks(2, synthetic_set, output, EVERY_STEP, resume=True, act=(1, 7, "kill"))
    assert [ended.status for ended in killed] == [1, -9]
    lines = [line for line in killed[0].errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "error: rank 1 (node0, process " in lines[0]
    assert lines[0].endswith(") gives no sign of life: killed, stopped or cut off")
    assert not (output / INTERRUPTED).exists()

    resumed = run_ranks(2, synthetic_set, output, resume=True)
    assert [ended.status for ended in resumed] == [0, 0]
    assert_same_end(output, finished, STEPS)
    records = [record for record in read_metrics(output / "metrics.jsonl") if record["kind"] == "eval"]
    assert records == [record for record in read_metrics(finished / "metrics.jsonl") if record["kind"] == "eval"]


@needs_horovod
def test_the_main_rank_alone_leaves_records_and_they_say_that_all_weights_are_the_same(finished: Path) -> None:
    log = (finished / "train.log").read_text()
    assert log.count("step 16: weights of all 2 ranks: ") == 1
    assert log.count("epoch 2/2 step 8/8") == 1
    assert {path.name for path in (finished / "checkpoints").iterdir()} == {BEST, f"step_{STEPS:09d}.pt"}


@needs_horovod
def test_a_run_is_resumed_by_as_many_processes_as_it_had(finished: Path, synthetic_set: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    with pytest.raises(CheckpointError, match=r"copy: a run of 2 processes: expected as many to go on with it, not 1"):
        train(tiny_config(("training.epochs=3",)), synthetic_set, copy, resume=True)


@needs_horovod
def test_training_goes_on_while_a_score_is_computed_which_then_stops_all_ranks(
    synthetic_set: Path, tmp_path: Path
) -> None:
    slow = tmp_path / "slow"
    slow.write_text(f'#!/bin/sh\nsleep 2\nexec {sys.executable} "$@"\n')
    slow.chmod(0o755)
    output = tmp_path / "run"
    overrides = ("evaluation.target_map=0.0", "training.epochs=100")
    ranks = run_ranks(2, synthetic_set, output, *overrides, act=(0, 1, slow))
    assert [ended.status for ended in ranks] == [0, 0], ranks[0].errors
    log = (output / "train.log").read_text()
    assert log.index("epoch 2/100 step 3/8") < log.index("epoch 1/100 mAP")
    best = load_checkpoint(output / "checkpoints" / BEST)
    assert best.step == 8
    assert list(read_scores(output / "scores.json", until_epoch=99).by_epoch) == [1]
    assert '"status": "success"' in (output / "mlperf.log").read_text()
    assert train(tiny_config(overrides), synthetic_set, output, resume=True).reached_target


@needs_horovod
def test_evaluation_by_two_and_three_ranks_gives_the_bits_of_one(
    finished: Path, synthetic_set: Path, tmp_path: Path
) -> None:
    command = (
        *(sys.executable, "-m", "ssd_fast", "evaluate", "--checkpoint", str(finished / "checkpoints" / BEST)),
        *("--data", str(synthetic_set), "--set", "evaluation.batch_size=4", "--set", "detection.score_threshold=0.01"),
    )
    alone = subprocess.run([*command, "--output", str(tmp_path / "1.json")], capture_output=True, text=True, check=True)
    assert alone.stdout.count("Average") == 12
    assert len(json.loads((tmp_path / "1.json").read_text())) > 100
    for size in (2, 3):
        ranks = run_job(size, *command, "--output", str(tmp_path / f"{size}.json"))
        assert [ended.status for ended in ranks] == [0] * size, ranks[0].errors
        assert [ended.output for ended in ranks] == [alone.stdout, *[""] * (size - 1)]
        assert (tmp_path / f"{size}.json").read_bytes() == (tmp_path / "1.json").read_bytes()


# ---- ranks that fail ----


@needs_horovod
def test_a_lost_or_hung_rank_is_named_and_ends_the_others_in_time() -> None:
    def failing(stack: ExitStack, size: int, how: str) -> Job:
        port = stack.enter_context(rendezvous())
        command = [sys.executable, "-c", FAIL, how]
        return stack.enter_context(started(size, command, horovodrun_environment, port))

    with ExitStack() as stack:
        stopped, asleep, raised = (failing(stack, *job) for job in ((3, "stop"), (2, "sleep"), (2, "raise")))
        for job, ranks, reason in (
            (raised, (0,), ") ended with: a test's own error"),
            (stopped, (0, 1), ") gives no sign of life: killed, stopped or cut off"),
            (asleep, (0,), ") lives, but hangs: it has not come to where the others wait"),
        ):
            ends = job.end_of(ranks)
            assert [ended.status for ended in ends] == [1] * len(ranks)
            lines = [line for ended in ends for line in ended.errors.splitlines() if line.startswith("error: ")]
            assert len(lines) == 1
            assert f"error: rank {len(ranks)} (node0, process " in lines[0]
            assert lines[0].endswith(reason)
            assert all(ended.time - float(ended.output) < TIMEOUT_S + 5 for ended in ends)


def test_apex_is_asked_for_by_name(synthetic_set: Path, tmp_path: Path) -> None:
    for change, message in (
        ("optimizer.implementation=apex", r"optimizer\.implementation = 'apex': expected a GPU"),
        ("distributed.batch_norm_group=2", r"distributed\.batch_norm_group = 2: expected a GPU"),
    ):
        with pytest.raises(ValueError, match=message):
            train(tiny_config((change,)), synthetic_set, tmp_path / "run", resume=False)
