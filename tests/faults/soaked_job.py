"""A small training job on two pretended nodes, and the disk that it writes to: what faults are caused to."""

import fcntl
import os
import random
import resource
import signal
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from network import Network, Node
from phases import PHASES, log_size, phase_of
from ranks import SERVER, Rank, node_environment
from repository import REPOSITORY
from tiny import TINY

from ssd_fast.checkpoints.checkpoint import newest_checkpoint
from ssd_fast.data.synthesize import synthesize

PER_NODE = 2
CGROUPS = Path("/sys/fs/cgroup/memory")  # of version 1
_GROUP = f"ssd_fast_{os.getpid()}"
_SHUTDOWN, _WITHOUT_LOG = 0x8004587D, 2  # FS_IOC_SHUTDOWN of ext4
_RECIPE = (
    *TINY,
    "training.epochs=5",
    "training.batch_size=4",
    "training.keep_checkpoints=2",
    "training.checkpoint_every_steps=2",
    "training.log_every_steps=2",
    "evaluation.epochs=[1, 2, 3, 4]",
    "evaluation.batch_size=1",
)


class Disk:
    """A file system of its own, on a loop device, while the context lasts; it can fill, fail and be repaired."""

    def __init__(self, place: Path) -> None:
        self.folder = place / "disk"
        self._image = place / "disk.img"

    def __enter__(self) -> Self:
        _run("truncate", "--size=600M", self._image)
        _run("mkfs.ext4", "-q", "-E", "lazy_itable_init=0", self._image)
        self.folder.mkdir()
        self._device = _run("losetup", "--find", "--show", self._image).strip()
        _run("mount", "-o", "errors=remount-ro", self._device, self.folder)
        return self

    def __exit__(self, *exc_info: object) -> None:
        _run("umount", "--lazy", self.folder)
        _run("losetup", "--detach", self._device)

    def slow(self, rank: Rank, bytes_per_s: int) -> None:
        """Let a rank write no faster than that from now on; 0: as fast as it can."""
        group = _group("blkio")
        device = Path(self._device).stat().st_rdev
        limit = f"{os.major(device)}:{os.minor(device)} {bytes_per_s}"
        (group / "blkio.throttle.write_bps_device").write_text(limit)
        (group / "cgroup.procs").write_text(str(rank.process.pid))

    def fill(self) -> Path:
        """Use up all space with a file, and return it."""
        ballast = self.folder / "ballast"
        with ballast.open("wb") as file:
            free = os.statvfs(self.folder).f_bavail * os.statvfs(self.folder).f_frsize
            os.posix_fallocate(file.fileno(), 0, free)
        return ballast

    def go_read_only(self) -> None:
        """Let the kernel find an error of the file system, and refuse all writing from now on."""
        Path("/sys/fs/ext4", Path(self._device).name, "trigger_fs_error").write_text("1")

    def die(self) -> None:
        """Fail each access from now on; what was not written durably is lost."""
        descriptor = os.open(self.folder, os.O_RDONLY)
        fcntl.ioctl(descriptor, _SHUTDOWN, struct.pack("I", _WITHOUT_LOG))
        os.close(descriptor)

    def repair(self) -> None:
        """Mount the disk again, after a check, once no process uses it."""
        _run("umount", self.folder)
        subprocess.run(["e2fsck", "-p", self._device], check=False, capture_output=True)
        _run("mount", "-o", "errors=remount-ro", self._device, self.folder)


class Site(NamedTuple):
    """What a job runs on."""

    network: Network
    disk: Disk
    data: Path


@contextmanager
def make_site(folder: Path) -> Iterator[Site]:
    """Two nodes, a disk and a small set of images. Raises OSError where this user or machine may not make them."""
    with Network(2) as network, Disk(folder) as disk:
        synthesize(folder / "data", num_images=80, seed=0)
        try:
            yield Site(network, disk, folder / "data")
        finally:
            for group in CGROUPS.parent.glob(f"*/{_GROUP}"):
                group.rmdir()


class SoakedJob:
    """The ranks of a start of the run, and their rendezvous server, while the context lasts."""

    def __init__(self, site: Site, output: Path, chance: random.Random, timeout_s: int = 10) -> None:
        """output: on the site's disk. timeout_s: of the recipe."""
        self.network, self.disk, self.data = site
        self.output = output
        self.timeout_s = timeout_s
        self.limit_s = 3.0 * timeout_s + 15  # from a fault to the end of all ranks; they share two cores
        self._recipe = (*_RECIPE, f"distributed.timeout_s={timeout_s}")
        self.random = chance
        self.ranks: list[Rank] = []
        self.last_end: float | None = None
        self._dismissed: set[int] = set()

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory()
        self.server = self._start("server", ["-c", SERVER], node_environment(0, PER_NODE, self.network.nodes, 0))
        while not self.server.output().endswith("\n"):
            time.sleep(0.02)
        port = int(self.server.output())
        for rank in range(PER_NODE * len(self.network.nodes)):
            environment = os.environ | node_environment(rank, PER_NODE, self.network.nodes, port)
            self.ranks.append(self._start(str(rank), self.arguments(), environment))
        self._log_from = log_size(self.output)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for rank in (*self.ranks, self.server):
            rank.process.kill()
            rank.process.join()
        self._folder.cleanup()

    def arguments(self) -> list[str]:
        """Of Python, for a rank."""
        places = ["--data", str(self.data), "--output", str(self.output), "--resume"]
        sets = [part for override in self._recipe for part in ("--set", override)]
        return ["-m", "ssd_fast", "train", "--config", str(REPOSITORY / "configs" / "demo.toml"), *places, *sets]

    def start_another(self) -> Rank:
        """Start one more process, which trains alone into the same folder."""
        return self._start("another", self.arguments(), dict(os.environ))

    def _start(self, name: str, arguments: list[str], environment: dict[str, str]) -> Rank:
        place = Path(tempfile.mkdtemp(prefix=name, dir=self._folder.name))
        return Rank(arguments, {**os.environ, **environment}, place)

    def wait(self, seconds: float) -> bool:
        """Wait so long, or until all ranks have ended; return whether one still runs."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self.is_over():
            time.sleep(0.003)
        return not self.is_over()

    def wait_at_random(self, usual_s: float) -> bool:
        """Wait for some time, or for a phase that is short; return whether a rank still runs."""
        if self.random.random() < 0.5:
            return self.wait(self.random.uniform(0.0, usual_s / 2))
        phase, deadline = self.random.choice(PHASES), time.monotonic() + usual_s / 2
        while self.phase() != phase and time.monotonic() < deadline and self.wait(0.003):
            pass
        return not self.is_over()

    def wait_for_end(self, seconds: float) -> bool:
        """Wait for the end of all ranks; return whether it came in time."""
        self.wait(seconds)
        self.last_end = time.monotonic()
        return self.is_over()

    def is_over(self) -> bool:
        return all(rank.process.exitcode is not None for rank in self._awaited())

    def dismiss(self, rank: int) -> None:
        """Do not wait for a rank, which cannot end by itself."""
        self._dismissed.add(rank)

    def _awaited(self) -> list[Rank]:
        return [rank for number, rank in enumerate(self.ranks) if number not in self._dismissed]

    def statuses(self) -> list[int | None]:
        return [rank.process.exitcode for rank in self.ranks]

    def errors(self) -> str:
        """Return what the ranks have printed to stderr."""
        return "\n".join(rank.errors() for rank in self.ranks)

    def abort(self) -> str:
        """Abort the ranks that still run, and return where each of their threads was."""
        remaining = [rank for rank in range(len(self.ranks)) if self.ranks[rank].process.exitcode is None]
        for rank in remaining:
            self.signal(rank, signal.SIGABRT)
        self.wait(5.0)
        return "\n".join(f"rank {rank}: {self.ranks[rank].errors()}" for rank in remaining)

    def kill(self) -> None:
        for rank in self.ranks:
            rank.process.kill()
            rank.process.join()

    def random_rank(self) -> int:
        return self.random.randrange(len(self.ranks))

    def random_node(self) -> tuple[Node, list[int]]:
        """A node, and its ranks."""
        number = self.random.randrange(len(self.network.nodes))
        return self.network.nodes[number], list(range(number * PER_NODE, (number + 1) * PER_NODE))

    def signal(self, rank: int, number: signal.Signals) -> None:
        process = self.ranks[rank].process
        if process.exitcode is None and process.pid is not None:
            os.kill(process.pid, number)

    def limit_memory(self, rank: int, bytes_more: int) -> None:
        """Let the kernel kill a rank when it takes so much more memory than it has now."""
        group = _group("memory")
        (group / "memory.limit_in_bytes").write_text(str(bytes_more))
        (group / "cgroup.procs").write_text(str(self.ranks[rank].process.pid))

    def limit_addresses(self, rank: int) -> None:
        """Refuse a rank more memory than it has now."""
        pid = self.ranks[rank].process.pid
        assert pid is not None
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
        resource.prlimit(pid, resource.RLIMIT_AS, (pages * resource.getpagesize(), resource.RLIM_INFINITY))

    def phase(self) -> str:
        """What the run is doing."""
        return phase_of(self.output, self._log_from)

    def newest_step(self) -> int:
        """Steps of the newest readable checkpoint."""
        checkpoint = newest_checkpoint(self.output / "checkpoints")
        return checkpoint.step if checkpoint else 0

    def was_stopped(self) -> bool:
        """Whether the run has saved because it was asked to stop."""
        return (self.output / "interrupted").exists()


def _group(controller: str) -> Path:
    """This program's own group of a controller."""
    group = CGROUPS.parent / controller / _GROUP
    group.mkdir(exist_ok=True)
    return group


def _run(*command: object) -> str:
    result = subprocess.run([str(part) for part in command], check=False, capture_output=True, text=True)
    if result.returncode != 0:
        raise OSError(f"{' '.join(map(str, command))}: {result.stderr.strip()}")
    return result.stdout
