"""Asking a run to stop: Ctrl-C, and the SIGTERM of batch systems."""

import signal
from types import FrameType, TracebackType


class StopRequest:
    """As a context manager, takes the first SIGINT or SIGTERM as a wish to stop; a second acts as usual.

    received: number of the signal that came, 0 before.
    """

    def __init__(self) -> None:
        self.received = 0
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
        self.received = number
        self.__exit__(None, None, None)
