"""Ranks as processes of a test, started as a launcher starts them, of which the end of each can be seen."""

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import pytest
from repository import REPOSITORY

from ssd_fast.distributed.slurm import slurm_variables

Environment = Callable[[int, int, int], dict[str, str]]

needs_horovod = pytest.mark.skipif(
    importlib.util.find_spec("horovod") is None, reason="Horovod is not installed (make horovod)"
)
WORKER = (sys.executable, str(REPOSITORY / "tests" / "support" / "distributed_worker.py"))


class Ended(NamedTuple):
    """The end of a rank."""

    status: int
    output: str
    errors: str
    time: float
    """When it was seen to have ended."""

    def error_lines(self) -> list[str]:
        return [line for line in self.errors.splitlines() if line.startswith("error: ")]


class Job:
    """Ranks that have been started."""

    def __init__(self, processes: list[subprocess.Popen[str]]) -> None:
        self._processes = processes

    def end_of(self, ranks: Sequence[int] | None = None) -> list[Ended]:
        """Wait for some ranks, or for all, and return how they ended."""
        ended = []
        for process in self._processes if ranks is None else [self._processes[rank] for rank in ranks]:
            output, errors = process.communicate(timeout=300)
            ended.append(Ended(process.returncode, output, errors, time.time()))
        return ended


def slurm_environment(rank: int, size: int, port: int) -> dict[str, str]:
    """Variables of a task of run.slurm's step on one node; port: that of the rendezvous."""
    variables = {"PROCID": rank, "NTASKS": size, "LOCALID": rank, "NODEID": 0, "NNODES": 1, "STEP_TASKS_PER_NODE": size}
    return {
        **{f"SLURM_{name}": str(value) for name, value in variables.items()},
        "SLURMD_NODENAME": "node0",
        "SSD_FAST_RENDEZVOUS": f"127.0.0.1:{port}",
    }


def horovodrun_environment(rank: int, size: int, port: int) -> dict[str, str]:
    """Variables that horovodrun sets for a rank on one node."""
    return slurm_variables(slurm_environment(rank, size, port))


@contextmanager
def rendezvous() -> Iterator[int]:
    """Serve Horovod's own rendezvous within this context; yields its port."""
    from horovod.runner.http.http_server import RendezvousServer

    server = RendezvousServer()
    port = server.start()
    server.init([])
    try:
        yield port
    finally:
        server.stop()


@contextmanager
def started(size: int, command: Sequence[str], environment: Environment, port: int) -> Iterator[Job]:
    """A job of so many ranks; none of them outlives the context."""
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
    """Run a command as so many ranks, and return how they ended."""
    with rendezvous() as port, started(size, command, horovodrun_environment, port) as job:
        return job.end_of()
