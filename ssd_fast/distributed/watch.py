"""Find lost and hanging ranks, and end this process when one of them keeps it waiting.

Horovod waits for ever for a process that was stopped, and names no rank when one dies. Here every rank leaves signs of
life in the key-value store of the launcher's rendezvous.
"""

import json
import logging
import os
import sys
import threading
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from http.client import HTTPException
from typing import NamedTuple
from urllib.error import HTTPError

from ssd_fast.distributed.slurm import Launch
from ssd_fast.hardware import memory_kills

_WORKS, _WAITS, _GAVE_UP = "works", "waits", "gave up"
_NUM_SPEAKERS = 8  # the first of these ranks to give up prints the reason


class Sign(NamedTuple):
    """The last message of a rank about itself."""

    beats: int
    """Number of signs so far: it grows as long as the process runs."""
    host: str
    process: int
    memory_kills: int
    """Processes that the kernel of its node has killed for lack of memory since this rank began."""
    activity: str
    """What it is doing that may take long, or nothing."""
    state: str
    """One of the words above, or how the rank ended."""


class Board:
    """The key-value store in which ranks leave their signs."""

    def __init__(self, url: str, timeout_s: float) -> None:
        """timeout_s: longest wait for an answer."""
        self._url = f"{url}/ssd_fast"
        self._timeout_s = timeout_s
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # clusters set proxies

    def write(self, rank: int, sign: Sign) -> None:
        """Replace a rank's sign, if the launcher answers."""
        with suppress(OSError, HTTPException):
            self._request(rank, json.dumps(sign).encode())

    def read(self, rank: int) -> Sign | None:
        """Return a rank's sign; None where it has left none. Raises OSError where the launcher does not answer."""
        try:
            return Sign(*json.loads(self._request(rank)))
        except HTTPError:  # no such key
            return None
        except (HTTPException, ValueError):  # the launcher ended within its answer
            raise ConnectionError from None

    def read_all(self, size: int) -> list[Sign | None]:
        """Return the signs of all ranks. Raises OSError as read does."""
        return [self.read(rank) for rank in range(size)]

    def _request(self, rank: int, body: bytes | None = None) -> bytes:
        request = urllib.request.Request(f"{self._url}/{rank}", data=body, method="PUT" if body else "GET")
        with self._opener.open(request, timeout=self._timeout_s) as response:
            return response.read()


class Watch(threading.Thread):
    """A thread that leaves signs of life of this rank, and ends the process when others keep it waiting."""

    def __init__(self, launch: Launch, timeout_s: float) -> None:
        """timeout_s: longest time from the start of a wait to the end of the process."""
        super().__init__(name="watch", daemon=True)
        self._launch = launch
        self._patience_s = 0.8 * timeout_s  # the rest is for finding the missing rank
        self._interval_s = min(timeout_s / 20, 5.0)
        self._board = Board(launch.rendezvous, self._interval_s)
        self._beats = 0
        self._memory_kills = memory_kills()
        self._waiting_since: float | None = None
        self._waited_s = 0.0
        self._activity = ""
        self._last_state: str | None = None
        self._ended = threading.Event()
        self._lock = threading.Lock()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Mark the time in which this process waits for other ranks."""
        self._waiting_since = time.monotonic()
        try:
            yield
        finally:
            self._waited_s += time.monotonic() - self._waiting_since
            self._waiting_since = None

    @contextmanager
    def doing(self, activity: str) -> Iterator[None]:
        """Name what this process is doing, for the others' message if they wait too long for it."""
        self._activity = activity
        try:
            yield
        finally:
            self._activity = ""

    def take_waited(self) -> float:
        """Return the seconds for which this process has waited for others since the last call."""
        waited_s, self._waited_s = self._waited_s, 0.0
        return waited_s

    def host_of(self, rank: int) -> str:
        """Name of the node of a rank, as far as it is known."""
        with suppress(OSError):
            sign = self._board.read(rank)
            return sign.host if sign else "?"
        return "?"

    def run(self) -> None:
        self._beat()
        while not self._ended.wait(self._interval_s):
            self._beat()
            since = self._waiting_since
            if since is not None and time.monotonic() - since > self._patience_s:
                self.give_up()

    def end(self, state: str) -> None:
        """Stop watching, and leave a last state for the other ranks to read."""
        self._last_state = state
        self._ended.set()
        self._beat()

    def give_up(self) -> None:
        """Print which ranks are missing, and exit at once: Horovod's own end would wait for them."""
        with self._lock:  # a second thread that comes here waits for the exit
            self.end(_GAVE_UP)
            try:
                message = self._find_missing()
            except OSError:
                message = (
                    f"{self._launch.host}: the launcher at {self._launch.rendezvous} does not answer: this node is cut "
                    "off from the launcher's, or that one is down"
                )
            if message:
                print(f"error: {message}", file=sys.stderr)
            else:
                time.sleep(self._interval_s)  # a launcher kills all ranks when the first exits: let the speaker print
            logging.shutdown()
            sys.stderr.flush()
            os._exit(1)

    def _find_missing(self) -> str | None:
        """Return one line on the ranks that keep the others waiting; None where another rank prints it."""
        rank, size = self._launch.rank, self._launch.size
        is_speaker = rank < _NUM_SPEAKERS
        before = self._board.read_all(size) if is_speaker else []
        time.sleep(2.5 * self._interval_s)
        for lower in range(min(rank, _NUM_SPEAKERS)):
            sign = self._board.read(lower)
            if sign is not None and sign.state == _GAVE_UP:
                return None
        if not is_speaker:  # not one of them has come here: they are all lost
            before = self._board.read_all(size)
            time.sleep(2.5 * self._interval_s)
        return _describe(before, self._board.read_all(size))

    def _beat(self) -> None:
        self._beats += 1
        state = self._last_state or (_WORKS if self._waiting_since is None else _WAITS)
        kills = memory_kills() - self._memory_kills
        sign = Sign(self._beats, self._launch.host, os.getpid(), kills, self._activity, state)
        self._board.write(self._launch.rank, sign)


def _describe(before: Sequence[Sign | None], after: Sequence[Sign | None]) -> str:
    """A line on the ranks that keep the others waiting, from the signs of all ranks at two moments."""
    lost: dict[tuple[str, str], list[int]] = defaultdict(list)  # ranks by node and fate
    late: dict[tuple[str, str], list[int]] = defaultdict(list)
    for rank, (old, sign) in enumerate(zip(before, after, strict=True)):
        if sign is None:
            lost["", "not started"].append(rank)
        elif sign.state.startswith("ended"):
            lost[sign.host, sign.state].append(rank)
        elif sign.state == _GAVE_UP:
            continue
        elif old is not None and sign.beats == old.beats:
            lost[sign.host, "gives no sign of life: killed, stopped or cut off"].append(rank)
        elif sign.state == _WORKS:
            fate = f"lives, but still {sign.activity}" if sign.activity else "lives, but hangs"
            late[sign.host, f"{fate}: it has not come to where the others wait"].append(rank)
    parts = [_name(ranks, host, after) + fate for (host, fate), ranks in (lost or late).items()]
    nodes = {host for host, _ in lost}  # "" where it is not known
    killed = {sign.host: sign.memory_kills for sign in after if sign and sign.memory_kills}
    parts += [
        f"the kernel of {host} has killed {number} process{'es' if number > 1 else ''} for lack of memory meanwhile"
        for host, number in killed.items()
        if nodes & {host, ""}
    ]
    return "; ".join(parts) or "all ranks wait for each other: the network between them may be the reason"


def _name(ranks: Sequence[int], host: str, signs: Sequence[Sign | None]) -> str:
    """Ranks of a node as the beginning of a sentence."""
    if len(ranks) > 1:
        numbers = ", ".join(map(str, ranks))
        return f"ranks {numbers} ({host}), each: " if host else f"ranks {numbers}: "
    sign = signs[ranks[0]]
    return f"rank {ranks[0]} ({sign.host}, process {sign.process}) " if sign else f"rank {ranks[0]}: "
