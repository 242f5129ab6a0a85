"""Every way in which a rank may fail ends the others, and one of them names it."""

import json
import logging
import os
import signal
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
from ranks import Job, horovodrun_environment, needs_horovod, rendezvous, run_job, started

from ssd_fast.distributed import watch
from ssd_fast.distributed.slurm import Launch
from ssd_fast.distributed.watch import Sign, Watch

TIMEOUT_S = 15
# Twenty steps; then the last rank fails. Ranks connect when all of them have imported what they need: on a busy machine
# that may take some of them longer than the timeout.
FAIL = f"""
import os, signal, sys, time
from pathlib import Path
import horovod.torch, torch
from ssd_fast.config.sections import DistributedConfig
from ssd_fast.distributed.launch import connect

how, ready = sys.argv[1], Path(sys.argv[2])
(ready / str(os.getpid())).touch()
while len(list(ready.iterdir())) < int(os.environ["HOROVOD_SIZE"]):
    time.sleep(0.05)
with connect(DistributedConfig(timeout_s={TIMEOUT_S})) as world:
    for step in range(100000):
        if step == 20:
            print(time.time(), flush=True)
            if world.rank == world.size - 1:
                if how == "raise":
                    raise ValueError("a test's own error")
                time.sleep(1000) if how == "sleep" else os.kill(os.getpid(), signal.SIGSTOP)
        world.average_(torch.ones(1))
"""


@needs_horovod
def test_a_lost_or_hung_rank_is_named_and_ends_the_others_in_time(tmp_path: Path) -> None:
    def failing(stack: ExitStack, size: int, how: str) -> Job:
        port = stack.enter_context(rendezvous())
        (tmp_path / how).mkdir()
        arguments = ["-c", FAIL, how, str(tmp_path / how)]
        return stack.enter_context(started(size, arguments, horovodrun_environment, port))

    with ExitStack() as stack:
        stopped, asleep, raised = (failing(stack, *job) for job in ((3, "stop"), (2, "sleep"), (2, "raise")))
        for job, ranks, reason in (
            (raised, (0,), ") ended with: a test's own error"),
            (stopped, (0, 1), ") gives no sign of life: killed, stopped or cut off"),
            (asleep, (0,), ") lives, but hangs: it has not come to where the others wait"),
        ):
            ends = job.end_of(ranks)
            assert [ended.status for ended in ends] == [1] * len(ranks), ends
            lines = [line for ended in ends for line in ended.error_lines()]
            assert len(lines) == 1, ends
            assert f"error: rank {len(ranks)} (node0, process " in lines[0]
            assert reason in lines[0]  # another test's processes may have been killed for lack of memory meanwhile
            assert all(ended.time - float(ended.output) < 2 * TIMEOUT_S for ended in ends)  # Gloo's own limit


@needs_horovod
def test_a_rank_that_is_lost_while_all_connect_is_named(tmp_path: Path) -> None:
    def kill(scope: str, key: str, values: Mapping[str, Mapping[str, bytes]]) -> None:
        if scope.startswith("cross_1_process_set") and key == "0":  # its last message before the first collective
            os.kill(Sign(*json.loads(values["ssd_fast"]["1"])).process, signal.SIGKILL)

    with rendezvous(kill) as port:
        arguments = ["-c", FAIL, "", str(tmp_path)]
        with started(2, arguments, horovodrun_environment, port) as job:
            survivor, killed = job.end_of()
    assert (survivor.status, killed.status) == (1, -signal.SIGKILL)
    (line,) = survivor.error_lines()
    assert "error: rank 1 (node0, process " in line
    assert ") gives no sign of life: killed, stopped or cut off" in line


LATE = """
import time
from ssd_fast.config.sections import DistributedConfig
from ssd_fast.distributed.launch import connect

with connect(DistributedConfig(timeout_s=60)) as world:
    world.agree(15)
    if world.is_main:
        time.sleep(3)
    print(*world.agree(0))
"""


@needs_horovod
def test_a_rank_that_is_asked_to_stop_waits_for_those_that_have_not_heard_of_it() -> None:
    ranks = run_job(2, "-c", LATE)
    assert [(rank.status, rank.output, rank.errors) for rank in ranks] == [(0, "15\n", "")] * 2


HANG = """
import time
from ssd_fast.distributed.slurm import read_launch
from ssd_fast.distributed.watch import Watch

Watch(read_launch(), 5.0).start()
time.sleep(1000)
"""


@needs_horovod
def test_a_rank_that_does_not_notice_the_failure_of_another_ends_too() -> None:
    with rendezvous() as port, started(1, ["-c", HANG], horovodrun_environment, port) as job:
        watch.Board(f"http://127.0.0.1:{port}", 5.0).write_over()
        (ended,) = job.end_of()
    assert (ended.status, ended.errors) == (1, "")


class Exit(Exception):
    """In the place of the end of the process."""


def given_up(
    monkeypatch: pytest.MonkeyPatch, rank: int, before: Sequence[Sign | None], after: Sequence[Sign | None]
) -> None:
    """Let a rank give up: the others' signs are `before` at first, and `after` when it looks again."""
    monkeypatch.setattr("os._exit", lambda status: (_ for _ in ()).throw(Exit(status)))
    monkeypatch.setattr(logging, "shutdown", lambda: None)
    monkeypatch.setattr(watch.Board, "write", lambda *_: None)
    signs = before

    def sleep(_: float) -> None:
        nonlocal signs
        signs = after

    monkeypatch.setattr(watch.time, "sleep", sleep)
    monkeypatch.setattr(watch.Board, "read", lambda _, number: signs[number])
    launch = Launch(rank, len(before), rank, len(before), host="a", rendezvous="http://nowhere", has_thread_count=True)
    with pytest.raises(Exit, match="1"):
        Watch(launch, 10).give_up()


NOBODY_MISSING = (
    "all ranks wait for each other: the network between them may be the reason, or an error that Horovod printed"
)


def sign(beats: int, state: str, *, kills: int = 0, activity: str = "", host: str = "a") -> Sign:
    return Sign(beats, host, 1, kills, activity, state)


@pytest.mark.parametrize(
    ("last", "message"),
    [
        (None, "rank 1: not started"),
        (sign(2, "ended"), "rank 1 (a, process 1) ended"),
        (sign(1, "waits"), "rank 1 (a, process 1) gives no sign of life: killed, stopped or cut off"),
        (sign(2, "works"), "rank 1 (a, process 1) lives, but hangs: it has not come to where the others wait"),
        (
            sign(1, "waits", kills=1),
            "rank 1 (a, process 1) gives no sign of life: killed, stopped or cut off; "
            "the kernel of a has killed 1 process for lack of memory meanwhile",
        ),
        (
            sign(2, "works", activity="writes x.pt"),
            "rank 1 (a, process 1) lives, but still writes x.pt: it has not come to where the others wait",
        ),
        (sign(2, "waits"), NOBODY_MISSING),
        (sign(2, "gave up"), NOBODY_MISSING),
    ],
)
def test_the_first_rank_to_give_up_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], last: Sign | None, message: str
) -> None:
    given_up(monkeypatch, 0, [sign(1, "waits"), sign(1, "waits")], [sign(2, "gave up"), last])
    assert capsys.readouterr().err == f"error: {message}\n"


def test_a_lost_node_is_named_once_with_its_ranks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = [sign(1, "waits", host="b")] * 3
    given_up(monkeypatch, 0, [sign(1, "waits"), *lost], [sign(2, "gave up"), *lost])
    fate = "gives no sign of life: killed, stopped or cut off"
    assert capsys.readouterr().err == f"error: ranks 1, 2, 3 (b), each: {fate}\n"


def test_a_rank_that_cannot_reach_the_launcher_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os._exit", lambda status: (_ for _ in ()).throw(Exit(status)))
    monkeypatch.setattr(logging, "shutdown", lambda: None)
    launch = Launch(1, 2, 1, 2, host="a", rendezvous="http://127.0.0.1:9", has_thread_count=True)
    with pytest.raises(Exit, match="1"):
        Watch(launch, 1).give_up()
    assert capsys.readouterr().err.startswith("error: a: the launcher at http://127.0.0.1:9 does not answer: ")


@pytest.mark.parametrize(
    ("last", "message"),
    [
        ("said why", ""),
        ("gave up", "error: rank 0 (a, process 1) gave up, and was lost before it could say why\n"),
    ],
)
def test_a_rank_is_silent_where_a_lower_one_said_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], last: str, message: str
) -> None:
    own = sign(1, "gave up")
    given_up(monkeypatch, 1, [sign(1, "gave up"), own, None], [sign(2, last), own, None])
    assert capsys.readouterr().err == message


def test_a_thread_that_does_not_begin_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("_thread.start_new_thread", lambda *_: 1)  # as where memory is refused in its first lines
    launch = Launch(0, 1, 0, 1, host="a", rendezvous="http://127.0.0.1:9", has_thread_count=True)
    with pytest.raises(MemoryError, match="the thread that watches the other ranks does not begin"):
        Watch(launch, 0.1).start()
