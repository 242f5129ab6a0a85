"""Requests to stop a run: Ctrl-C, and the SIGTERM of batch systems."""

import signal
import time
from types import FrameType, TracebackType

_SAME_MOMENT_S = 1.0


class StopRequest:
    """A context in which the first SIGINT or SIGTERM is a request to stop; a later one acts as usual.

    Signals within one second count as one: Slurm signals every process of a step, and the runtime of a container
    forwards its signals to the process in it.

    received: number of the signal that came, 0 before.
    """

    def __init__(self) -> None:
        self.received = 0
        self._received_at = 0.0
        self._usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def __enter__(self) -> "StopRequest":
        for number in self._usual:
            signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._usual.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.received:
            self.received, self._received_at = number, now
        elif now - self._received_at > _SAME_MOMENT_S:
            self.__exit__(None, None, None)
            signal.raise_signal(number)
