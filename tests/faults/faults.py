"""The faults that a cluster is known for: how each is caused, and what the user must then see."""

import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from network import Weather
from soaked_job import CGROUPS, SoakedJob

Pattern = re.Pattern[str] | None

_LOST = r"rank[s ][\d, ]*\b{rank}\b.*(gives no sign of life|not started|ended with)"
_CUT = r"(gives no sign of life|not started|does not answer|the network between them)"


class Fault(NamedTuple):
    """A kind of fault.

    cause: a context that begins when it has been caused and ends with its repair; it gives what a message must say.
    ends: True where the run must end, False where it must go on, None where it may do either.
    loses: the newest checkpoint may be lost.
    """

    name: str
    cause: Callable[[SoakedJob], AbstractContextManager[Pattern]]
    ends: bool | None = True
    loses: bool = False
    needs_cgroups: bool = False

    def is_possible(self) -> bool:
        """Return true where this machine has what causes the fault: version 1 of cgroups for some of them."""
        return CGROUPS.is_dir() or not self.needs_cgroups


def _kill(job: SoakedJob) -> Iterator[Pattern]:
    rank = job.random_rank()
    job.signal(rank, signal.SIGKILL)
    yield re.compile(_LOST.format(rank=rank))


def _stop(job: SoakedJob) -> Iterator[Pattern]:
    rank = job.random_rank()
    job.signal(rank, signal.SIGSTOP)
    job.dismiss(rank)
    yield re.compile(_LOST.format(rank=rank))
    job.signal(rank, signal.SIGKILL)
    job.ranks[rank].process.join()


def _kill_node(job: SoakedJob) -> Iterator[Pattern]:
    node, ranks = job.random_node()
    job.network.set(node, Weather(is_cut=True))
    if 0 in ranks:
        job.server.process.kill()
    for rank in ranks:
        job.signal(rank, signal.SIGKILL)
    yield re.compile(_CUT)
    job.network.set(node, Weather())


def _terminate_all(job: SoakedJob) -> Iterator[Pattern]:
    for rank in range(len(job.ranks)):
        job.signal(rank, signal.SIGTERM)
    yield None


def _terminate_one(job: SoakedJob) -> Iterator[Pattern]:
    job.signal(job.random_rank(), signal.SIGTERM)
    yield None


def _kill_all(job: SoakedJob) -> Iterator[Pattern]:
    for rank in range(len(job.ranks)):
        job.signal(rank, signal.SIGKILL)
    yield None


def _cut(job: SoakedJob) -> Iterator[Pattern]:
    node, _ = job.random_node()
    job.network.set(node, Weather(is_cut=True))
    yield re.compile(_CUT)
    job.network.set(node, Weather())


def _for_some_time(weather: Weather) -> Callable[[SoakedJob], Iterator[Pattern]]:
    def cause(job: SoakedJob) -> Iterator[Pattern]:
        node, _ = job.random_node()
        job.network.set(node, weather)
        job.wait(job.timeout_s / 3)
        job.network.set(node, Weather())
        yield None

    return cause


def _slow(job: SoakedJob) -> Iterator[Pattern]:
    rank = job.random_rank()
    until = time.monotonic() + job.timeout_s / 3
    while time.monotonic() < until and not job.is_over():
        for number, seconds in ((signal.SIGSTOP, 0.1), (signal.SIGCONT, 0.05)):
            job.signal(rank, number)
            time.sleep(seconds)
    yield None


def _full(job: SoakedJob) -> Iterator[Pattern]:
    with suppress(OSError):
        job.disk.fill()
    yield re.compile("No space left on device")
    (job.disk.folder / "ballast").unlink()


def _read_only(job: SoakedJob) -> Iterator[Pattern]:
    job.disk.go_read_only()
    yield re.compile("Read-only file system|Input/output error|Structure needs cleaning")
    job.kill()
    job.disk.repair()


def _dead_disk(job: SoakedJob) -> Iterator[Pattern]:
    job.disk.die()
    yield re.compile("Input/output error")
    job.kill()
    job.disk.repair()


def _replaced(job: SoakedJob) -> Iterator[Pattern]:
    while job.phase() == "start" and job.wait(0.01):  # it does not use the folder yet
        pass
    if not job.output.exists():
        yield None
        return
    away = job.output.with_name("away")
    job.output.rename(away)
    (job.output / "checkpoints").mkdir(parents=True)
    yield re.compile("removed or replaced while it was in use|No such file or directory|none of its checkpoints")
    shutil.rmtree(job.output)
    away.rename(job.output)


def _flip(job: SoakedJob) -> Iterator[Pattern]:
    """A bit of the newest checkpoint, behind the back of the run; it is found when the run resumes."""
    for rank in range(len(job.ranks)):
        job.signal(rank, signal.SIGKILL)
    yield None
    newest = sorted((job.output / "checkpoints").glob("step_*.pt"))
    if len(newest) < 2:  # the only one must stay
        return
    content = bytearray(newest[-1].read_bytes())
    place = job.random.randrange(len(content))
    content[place] ^= 1 << job.random.randrange(8)
    newest[-1].write_bytes(content)


def _second(job: SoakedJob) -> Iterator[Pattern]:
    """A second job that is told to use the folder."""
    if job.phase() == "start":  # the first has not claimed the folder
        yield None
        return
    another = job.start_another()
    ended = another.end(60)
    if not job.is_over():
        assert ended.status == 1, ended
        assert "in use by" in ended.errors, ended
    yield None


def _memory(job: SoakedJob) -> Iterator[Pattern]:
    rank = job.random_rank()
    with suppress(OSError):
        job.limit_addresses(rank)
    in_horovod = rf"\[{rank}\]: Horovod background loop uncaught exception: .*allocate memory"
    yield re.compile(_LOST.format(rank=rank) + f"|{in_horovod}")


def _memory_kill(job: SoakedJob) -> Iterator[Pattern]:
    rank = job.random_rank()
    with suppress(OSError):  # it has ended
        job.limit_memory(rank, 2**16)
    # Ranks of the same node tell; none may be left, as Gloo aborts a rank that receives half a message. A rank may take
    # long to run out of memory, as the kernel first looks for what it can write back.
    others = rf"rank {rank}: not started|rank {rank} \(.* lives, but |ranks [\d, ]+ \(node"
    yield re.compile(_LOST.format(rank=rank) + f".*for lack of memory|{others}")


def _slow_disk(job: SoakedJob) -> Iterator[Pattern]:
    with suppress(OSError):
        job.disk.slow(job.ranks[0], 20_000_000)
    yield None


def _crawling_disk(job: SoakedJob) -> Iterator[Pattern]:
    rank = job.ranks[0]
    with suppress(OSError):
        job.disk.slow(rank, 1_000_000)
    job.dismiss(0)
    yield re.compile(r"rank 0 \(.* lives, but still writes .*step_\d+\.pt")
    job.signal(0, signal.SIGKILL)
    with suppress(OSError):
        job.disk.slow(rank, 0)
    rank.process.join()


def _image(job: SoakedJob) -> Iterator[Pattern]:
    images = sorted((job.data / "train2017").iterdir())
    image: Path = job.random.choice(images)
    kept = image.with_name("kept")
    image.rename(kept)
    image.write_bytes(kept.read_bytes()[: kept.stat().st_size // 2])
    yield re.compile(re.escape(image.name))
    kept.rename(image)


def _empty_caches(job: SoakedJob) -> Iterator[Pattern]:
    """The pages of all files leave memory: the next reading comes from the disk."""
    subprocess.run(["sync"], check=True)
    with suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("3")
    yield None


def _fault(
    name: str,
    cause: Callable[[SoakedJob], Iterator[Pattern]],
    *,
    ends: bool | None = True,
    loses: bool = False,
    needs_cgroups: bool = False,
) -> Fault:
    return Fault(name, contextmanager(cause), ends, loses, needs_cgroups)


FAULTS = (
    _fault("a rank is killed", _kill),
    _fault("a rank is stopped", _stop),
    _fault("all ranks are killed", _kill_all),
    _fault("a node dies", _kill_node),
    _fault("all ranks are asked to stop", _terminate_all),
    _fault("one rank is asked to stop", _terminate_one),
    _fault("a link is cut", _cut),
    _fault("a link is cut for T / 3", _for_some_time(Weather(is_cut=True)), ends=False),
    _fault("200 ms of delay for T / 3", _for_some_time(Weather(delay_s=0.1)), ends=False),
    _fault("5% of packets lost for T / 3", _for_some_time(Weather(loss=0.05)), ends=False),
    _fault("a rank at a third of its speed", _slow, ends=False),
    _fault("the disk is full", _full),
    _fault("the disk goes read-only", _read_only),
    _fault("the disk dies", _dead_disk),
    _fault("the folder is replaced", _replaced),
    _fault("a bit of a checkpoint flips", _flip, loses=True),
    _fault("a second job in the folder", _second, ends=False),
    _fault("a rank gets no more memory", _memory, ends=None),
    _fault("the kernel kills a rank for memory", _memory_kill, needs_cgroups=True),
    _fault("the disk writes 20 MB/s", _slow_disk, ends=False, needs_cgroups=True),
    _fault("the disk writes 1 MB/s", _crawling_disk, needs_cgroups=True),
    _fault("an image becomes unreadable", _image, ends=None),
    _fault("file caches are emptied", _empty_caches, ends=False),
)


class Event(NamedTuple):
    """A fault, and what came of it."""

    fault: str
    phase: str
    ended: bool
    """False where the run went on."""
    seconds: float
    """From the fault to the end of the last rank, or to the end of the fault."""
    message: str
    wrong: str
    """What was not as expected, or nothing."""


def disturb(job: SoakedJob, fault: Fault) -> Event | None:
    """Cause a fault, and see what comes of it; None where the run had ended before it mattered."""
    phase, before = job.phase(), job.newest_step()
    start = time.monotonic()
    with fault.cause(job) as expected:
        ends = job.wait_for_end(job.limit_s) if fault.ends is not False else True
    seconds = (job.last_end or time.monotonic()) - start
    ended = job.is_over() and (job.was_stopped() or any(job.statuses()))
    text = job.errors()
    if fault.ends is not False and ends and 0 in job.statuses() and not job.was_stopped():
        return None
    wrong = ""
    if not ends:
        wrong = f"not ended within {job.limit_s:g} s: {job.abort()}"
        job.kill()
    elif fault.ends and not ended:
        wrong = "the run went on"
    elif fault.ends is False and ended:
        wrong = "the run ended"
    elif ended and expected and not expected.search(text):
        wrong = f"no message like {expected.pattern!r}: {text[-800:]}"
    elif job.newest_step() < before and not fault.loses:
        wrong = f"step {before} was saved and is lost"
    found = expected.search(text) if expected else None
    return Event(fault.name, phase, ended, seconds, found[0] if found else "", wrong)
