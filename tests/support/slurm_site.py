"""Jobs of run.slurm that train a tiny detector on a pretended cluster."""

import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from phases import log_size, phase_of
from repository import REPOSITORY
from slurm_cluster import SlurmCluster
from tiny import tiny_config

from ssd_fast.config.recipe import dump_toml

SCRIPT = REPOSITORY / "run.slurm"
RANKS = ("-N2", "-n4")  # two nodes with two each
STEPS = 8  # two epochs of four: 64 images, a global batch of 16
START_S, RUN_S = 300, 900  # longest waits: other tests may keep the cores busy


class SlurmSite:
    """A cluster with a recipe, data and a folder for logs on it."""

    def __init__(self, cluster: SlurmCluster, data: Path, *overrides: str) -> None:
        """overrides: of the tiny recipe."""
        self.cluster = cluster
        changes = ("training.batch_size=4", "training.log_every_steps=1", "data.num_threads=1")
        self.recipe = cluster.folder / "tiny.toml"
        self.recipe.write_text(dump_toml(tiny_config((*changes, "distributed.timeout_s=60", *overrides))))
        self.logs = cluster.folder / "logs"
        self.logs.mkdir()
        self.variables = {
            "DATADIR": str(data),
            "LOGDIR": str(self.logs),
            "SYSTEM": str(self.recipe),
            "VENV": str(Path(sys.executable).parent.parent),
            "IFACE": "lo",
        }

    def submit(self, *options: str, ranks: Sequence[str] = RANKS, **variables: str) -> str:
        """Submit a job that trains or profiles, and return its number."""
        return self.cluster.submit(ranks, SCRIPT, options, environment=self.variables | variables)

    def run_of(self, job: str) -> Path:
        return self.logs / f"{self.recipe.stem}_{job}"

    def log_of(self, job: str) -> str:
        log = self.run_of(job) / "job.log"
        return log.read_text() if log.exists() else self.cluster.output(job)

    @contextmanager
    def stopped_within(self, phase: str, job: str, rank: int, run: Path | None = None) -> Iterator[int]:
        """Stop one rank within this context, in a phase of the job; yields its process.

        run: folder of the run, if it is not the job's own.
        """
        run = run or self.run_of(job)
        log_from, deadline = log_size(run), time.monotonic() + START_S
        process: int | None = None
        while True:
            assert time.monotonic() < deadline, f"no {phase} within {START_S} s: {self.log_of(job)}"
            assert self.cluster.field(job, "JobState") != "FAILED", self.log_of(job)
            process = process or process_of_rank(job, rank)
            try:
                if process and self._stop(process, phase, run, log_from):
                    break
            except ProcessLookupError:
                raise AssertionError(f"the run was over before it came to: {phase}: {self.log_of(job)}") from None
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGCONT)

    def _stop(self, process: int, phase: str, run: Path, log_from: int) -> bool:
        """Wait for some time for a phase, and stop a process in it; return whether it could."""
        deadline = time.monotonic() + 1.0
        while phase_of(run, log_from) != phase and time.monotonic() < deadline:
            time.sleep(0.002)
        os.kill(process, signal.SIGSTOP)
        if phase_of(run, log_from) == phase:
            return True
        os.kill(process, signal.SIGCONT)
        return False


def process_of_rank(job: str, rank: int) -> int | None:
    """Return the process of a job's task, if it has begun."""
    variables = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={rank}".encode()}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # another user's, or ended
            arguments = (folder / "cmdline").read_bytes().split(b"\0")
            if arguments[2:4] == [b"ssd_fast", b"train"] and (
                variables <= set((folder / "environ").read_bytes().split(b"\0"))
            ):
                return int(folder.name)
    return None
