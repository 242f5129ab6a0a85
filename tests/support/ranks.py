"""Ranks as processes of a test, with the environment that a launcher gives them; the end of each can be seen.

They are forks of a server that has imported what a rank needs: importing takes each rank longer than a test's training.
"""

import atexit
import faulthandler
import importlib.util
import multiprocessing
import os
import runpy
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import network
import pytest
from repository import REPOSITORY

from ssd_fast.distributed.slurm import slurm_variables

Environment = Callable[[int, int, int], dict[str, str]]

needs_horovod = pytest.mark.skipif(
    importlib.util.find_spec("horovod") is None, reason="Horovod is not installed (make horovod)"
)
WORKER = str(REPOSITORY / "tests" / "support" / "distributed_worker.py")
SERVER = """
import sys, time
from horovod.runner.http.http_server import RendezvousServer
server = RendezvousServer()
print(server.start(), flush=True)
server.init([])
time.sleep(1e9)
"""
_NAMESPACE = "TEST_NETWORK_NAMESPACE"
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["horovod.torch", "ssd_fast.training.run", "ssd_fast.evaluation.evaluate"])
_LONGEST_S = 300


class Ended(NamedTuple):
    """The end of a rank."""

    status: int
    output: str
    errors: str
    time: float
    """When it was seen to have ended."""

    def error_lines(self) -> list[str]:
        return [line for line in self.errors.splitlines() if line.startswith("error: ")]


class Rank:
    """A rank that runs `python ARGUMENTS…`: `-m MODULE …`, `-c CODE …` or `SCRIPT …`."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], folder: Path) -> None:
        """folder: an empty one for what the rank prints."""
        self._streams = folder / "stdout", folder / "stderr"
        for stream in self._streams:
            stream.touch()
        self.process = _FORKS.Process(target=_run, args=(list(arguments), dict(environment), self._streams))
        self.process.start()

    def end(self, longest_s: float = _LONGEST_S) -> Ended:
        """Wait for the end of the process, and return it."""
        self.process.join(longest_s)
        status = self.process.exitcode
        assert status is not None, f"a rank has not ended within {longest_s} s"
        return Ended(status, self.output(), self.errors(), time.time())

    def output(self) -> str:
        """Return what it has printed so far."""
        return self._streams[0].read_text()

    def errors(self) -> str:
        """Return what it has printed so far to stderr."""
        return self._streams[1].read_text()


def _run(arguments: list[str], environment: dict[str, str], streams: tuple[Path, Path]) -> None:
    """Be a Python process with these arguments."""
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, path in enumerate(streams, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), descriptor)
    faulthandler.enable()
    if namespace := os.environ.pop(_NAMESPACE, None):
        network.enter(namespace)
    kind, *rest = arguments
    try:
        match kind:
            case "-m":
                sys.argv = rest
                runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
            case "-c":
                sys.argv = ["-c", *rest[1:]]
                exec(rest[0], {"__name__": "__main__"})
            case _:
                sys.argv = arguments
                runpy.run_path(kind, run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing ends its processes without


class Job:
    """Ranks that have been started."""

    def __init__(self, ranks: list[Rank]) -> None:
        self._ranks = ranks

    def end_of(self, ranks: Sequence[int] | None = None) -> list[Ended]:
        """Wait for some ranks, or for all, and return how they ended."""
        return [rank.end() for rank in (self._ranks if ranks is None else [self._ranks[number] for number in ranks])]


def node_environment(rank: int, per_node: int, nodes: Sequence[network.Node], port: int) -> dict[str, str]:
    """Variables of a task of run.slurm's step on nodes with as many ranks each; the first node has the rendezvous."""
    node, local = divmod(rank, per_node)
    variables = {"PROCID": rank, "NTASKS": per_node * len(nodes), "LOCALID": local, "NODEID": node}
    return {
        **{f"SLURM_{name}": str(value) for name, value in (variables | {"NNODES": len(nodes)}).items()},
        "SLURMD_NODENAME": f"node{node}",
        "SSD_FAST_RENDEZVOUS": f"{nodes[0].address}:{port}",
        "HOROVOD_GLOO_IFACE": network.INTERFACE,
        _NAMESPACE: nodes[node].name,
    }


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
def rendezvous(on_write: Callable[[str, str, Mapping[str, Mapping[str, bytes]]], None] | None = None) -> Iterator[int]:
    """Serve Horovod's own rendezvous within this context; yields its port.

    on_write: called with scope, key and all values by scope and key, when a value has been written.
    """
    from horovod.runner.http.http_server import RendezvousHandler, RendezvousServer

    class Handler(RendezvousHandler):
        def _put_value(self, scope: str, key: str, value: bytes) -> None:
            super()._put_value(scope, key, value)
            if on_write:
                on_write(scope, key, self.server.cache)

    server = RendezvousServer()
    port = server.start(Handler)
    server.init([])
    try:
        yield port
    finally:
        server.stop()


@contextmanager
def started(size: int, arguments: Sequence[str], environment: Environment, port: int) -> Iterator[Job]:
    """A job of so many ranks; none of them outlives the context. arguments: of Python."""
    common = {**os.environ, "HOROVOD_GLOO_IFACE": "lo"}
    ranks: list[Rank] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for number in range(size):
                place = Path(folder, str(number))
                place.mkdir()
                ranks.append(Rank(arguments, common | environment(number, size, port), place))
            yield Job(ranks)
        finally:
            for rank in ranks:
                rank.process.kill()
                rank.process.join()


def run_job(size: int, *arguments: str) -> list[Ended]:
    """Run Python with these arguments as so many ranks, and return how they ended."""
    with rendezvous() as port, started(size, arguments, horovodrun_environment, port) as job:
        return job.end_of()
