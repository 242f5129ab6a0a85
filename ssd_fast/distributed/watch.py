"""Find lost and hanging ranks, and end this process when one of them keeps it waiting.

Horovod waits for ever for a process that was stopped, and names no rank when one dies. Here every rank leaves signs of
life in the key-value store of the launcher's rendezvous.
"""

import logging
import os
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from ssd_fast.distributed.slurm import Launch

_WORKS, _WAITS, _GAVE_UP = "works", "waits", "gave up"
_NUM_SPEAKERS = 8  # the first of these ranks to give up prints the reason


class Sign(NamedTuple):
    """The last message of a rank about itself."""

    beats: int
    """Number of signs so far: it grows as long as the process runs."""
    who: str
    """Node and process."""
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
        self._request(rank, f"{sign.beats}|{sign.who}|{sign.state}".encode())

    def read(self, rank: int) -> Sign | None:
        """Return a rank's sign; None where it has left none, or nobody answers."""
        answer = self._request(rank)
        if not answer:
            return None
        beats, who, state = answer.decode().split("|", 2)
        return Sign(int(beats), who, state)

    def _request(self, rank: int, body: bytes | None = None) -> bytes | None:
        request = urllib.request.Request(f"{self._url}/{rank}", data=body, method="PUT" if body else "GET")
        try:
            with self._opener.open(request, timeout=self._timeout_s) as response:
                return response.read()
        except OSError:  # no such key, or the launcher is gone
            return None


class Watch(threading.Thread):
    """A thread that leaves signs of life of this rank, and ends the process when others keep it waiting."""

    def __init__(self, launch: Launch, timeout_s: float) -> None:
        """timeout_s: longest time from the start of a wait to the end of the process."""
        super().__init__(name="watch", daemon=True)
        self._rank, self._size = launch.rank, launch.size
        self._patience_s = 0.8 * timeout_s  # the rest is for finding the missing rank
        self._interval_s = min(timeout_s / 20, 5.0)
        self._board = Board(launch.rendezvous, self._interval_s)
        self._who = f"{launch.host}, process {os.getpid()}"
        self._beats = 0
        self._waiting_since: float | None = None
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
            self._waiting_since = None

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
            message = self._find_missing()
            if message:
                print(f"error: {message}", file=sys.stderr)
            else:
                time.sleep(self._interval_s)  # a launcher kills all ranks when the first exits: let the speaker print
            logging.shutdown()
            sys.stderr.flush()
            os._exit(1)

    def _find_missing(self) -> str | None:
        """Return one line on the ranks that keep the others waiting; None where another rank prints it."""
        before = [self._board.read(rank) for rank in range(self._size)]
        time.sleep(2.5 * self._interval_s)
        for rank in range(min(self._rank, _NUM_SPEAKERS)):
            sign = self._board.read(rank)
            if sign is not None and sign.state == _GAVE_UP:
                return None
        lost, late = [], []
        for rank in range(self._size):
            sign = self._board.read(rank)
            if sign is None:
                lost.append(f"rank {rank} has not started")
            elif sign.state.startswith("ended"):
                lost.append(f"rank {rank} ({sign.who}) {sign.state}")
            elif sign.state == _GAVE_UP:
                continue
            elif sign == before[rank]:
                lost.append(f"rank {rank} ({sign.who}) gives no sign of life: killed, stopped or cut off")
            elif sign.state == _WORKS:
                late.append(f"rank {rank} ({sign.who}) lives, but hangs: it has not come to where the others wait")
        return "; ".join(lost or late) or "all ranks wait for each other: the network between them may be the reason"

    def _beat(self) -> None:
        self._beats += 1
        state = self._last_state or (_WORKS if self._waiting_since is None else _WAITS)
        self._board.write(self._rank, Sign(self._beats, self._who, state))
