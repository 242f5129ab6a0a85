"""Real time and busy cores, taken while nothing else happens on any rank."""

import time
from typing import NamedTuple

from ssd_fast.distributed.world import World
from ssd_fast.hardware import synchronize

LEAST, MOST = 2, 100  # batches or steps of a turn
_QUIET_S, _QUIET_CPU_S, _LONGEST_S = 0.01, 0.002, 5.0


class Lap(NamedTuple):
    """The time from start to stop. busy: share of it that the cores of this process worked."""

    seconds: float
    busy: float


class Stopwatch:
    """A clock that waits for the device before it is read."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._device = world.device()
        self._begin_s = self._begin_cpu_s = 0.0

    def settle(self) -> None:
        """Wait until no background thread works any more, on any rank."""
        synchronize(self._device)
        deadline, quiet = time.perf_counter() + _LONGEST_S, 0
        while quiet < 3 and time.perf_counter() < deadline:
            before = time.process_time()
            time.sleep(_QUIET_S)
            quiet = quiet + 1 if time.process_time() - before < _QUIET_CPU_S else 0
        self._world.broadcast(None)

    def start(self) -> None:
        """Begin a lap."""
        synchronize(self._device)
        self._begin_s, self._begin_cpu_s = time.perf_counter(), time.process_time()

    def stop(self) -> Lap:
        """End the lap."""
        synchronize(self._device)
        seconds = time.perf_counter() - self._begin_s
        return Lap(seconds, (time.process_time() - self._begin_cpu_s) / seconds / self._world.cores)

    def repeats(self, available_s: float, each_s: float) -> int:
        """Return how many batches or steps of each_s fit into a time, 2 to 100; the same number on all ranks."""
        return self._world.broadcast(round(min(max(available_s / each_s, LEAST), MOST)))
