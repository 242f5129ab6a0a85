"""Find lost and hanging ranks, and end this process when one of them keeps it waiting.

Horovod waits for ever for a process that was stopped, and names no rank when one dies. Here every rank leaves signs of
life in the key-value store of the launcher's rendezvous.
"""

import _thread
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

_WORKS, _WAITS, _GAVE_UP, _SAID_WHY = "works", "waits", "gave up", "said why"
_NUM_SPEAKERS = 8  # the first of these ranks to give up prints the reason
_OVER = "over"  # key that is there once a rank has failed


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

    def write_over(self) -> None:
        """Leave the word that a rank has failed, if the launcher answers."""
        with suppress(OSError, HTTPException):
            self._request(_OVER, b"1")

    def is_over(self) -> bool:
        """Return true where a rank has failed, as far as the launcher answers."""
        with suppress(OSError, HTTPException):
            self._request(_OVER)
            return True
        return False

    def read_all(self, size: int) -> list[Sign | None]:
        """Return the signs of all ranks. Raises OSError as read does."""
        return [self.read(rank) for rank in range(size)]

    def _request(self, key: int | str, body: bytes | None = None) -> bytes:
        request = urllib.request.Request(f"{self._url}/{key}", data=body, method="PUT" if body else "GET")
        with self._opener.open(request, timeout=self._timeout_s) as response:
            return response.read()


class Watch:
    """Leaves signs of life of this rank, and ends the process when others keep it waiting, in a thread of its own."""

    def __init__(self, launch: Launch, timeout_s: float) -> None:
        """timeout_s: longest time from the start of a wait to the end of the process."""
        self._launch = launch
        self._patience_s = 0.8 * timeout_s  # the rest is for finding the missing rank
        self._interval_s = min(timeout_s / 20, 5.0)
        self._board = Board(launch.rendezvous, self._interval_s)
        self._beats = 0
        self._memory_kills = memory_kills()
        self._waiting_since: float | None = None
        self._activity = ""
        self._last_state: str | None = None
        self._begun = threading.Event()
        self._ended = threading.Event()
        self._lock = threading.Lock()

    def start(self) -> None:
        """Start the thread. Raises MemoryError where it cannot begin; Thread.start of threading would wait for ever."""
        _thread.start_new_thread(self._run, ())
        if not self._begun.wait(self._patience_s):
            raise MemoryError("the thread that watches the other ranks does not begin")

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Mark the time in which this process waits for other ranks."""
        self._waiting_since = time.monotonic()
        try:
            yield
        finally:
            self._waiting_since = None

    @contextmanager
    def doing(self, activity: str) -> Iterator[None]:
        """Name what this process is doing, for the others' message if they wait too long for it."""
        self._activity = activity
        try:
            yield
        finally:
            self._activity = ""

    def host_of(self, rank: int) -> str:
        """Name of the node of a rank, as far as it is known."""
        with suppress(OSError):
            sign = self._board.read(rank)
            return sign.host if sign else "?"
        return "?"

    def _run(self) -> None:
        self._begun.set()
        self._beat()
        over_since: float | None = None
        while not self._ended.wait(self._interval_s):
            self._beat()
            now, since = time.monotonic(), self._waiting_since
            if since is not None and now - since > self._patience_s:
                self.give_up()
            if since is None and over_since is None and self._board.is_over():
                over_since = now
            if over_since is not None and now - over_since > self._patience_s / 4 and not self._activity:
                os._exit(1)  # it hangs in a call that does not notice; the others have said why the run ends

    def end(self, state: str) -> None:
        """Stop watching, and leave a last state for the other ranks to read."""
        self._last_state = state
        if state != "ended":
            self._board.write_over()
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
                self._last_state = _SAID_WHY
                self._beat()
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
            if sign is not None and sign.state in (_GAVE_UP, _SAID_WHY):
                return self._find_silent(lower, sign)
        if not is_speaker:  # not one of them has come here: they are all lost
            before = self._board.read_all(size)
            time.sleep(2.5 * self._interval_s)
        return _describe(before, self._board.read_all(size))

    def _find_silent(self, speaker: int, sign: Sign) -> str | None:
        """Wait until a rank that gave up, with this sign, has said why; return one line where it does not.

        A launcher kills all ranks when the first one exits, which must not be earlier.
        """
        for _ in range(6):
            time.sleep(0.5 * self._interval_s)
            last = self._board.read(speaker)
            if last is None or last.state == _SAID_WHY:
                return None
        return f"rank {speaker} ({sign.host}, process {sign.process}) gave up, and was lost before it could say why"

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
        elif sign.state in (_GAVE_UP, _SAID_WHY):
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
    return "; ".join(parts) or (
        "all ranks wait for each other: the network between them may be the reason, or an error that Horovod printed"
    )


def _name(ranks: Sequence[int], host: str, signs: Sequence[Sign | None]) -> str:
    """Ranks of a node as the beginning of a sentence."""
    if len(ranks) > 1:
        numbers = ", ".join(map(str, ranks))
        return f"ranks {numbers} ({host}), each: " if host else f"ranks {numbers}: "
    sign = signs[ranks[0]]
    return f"rank {ranks[0]} ({sign.host}, process {sign.process}) " if sign else f"rank {ranks[0]}: "
