"""A function that another Python process computes while this one goes on.

That process imports only the function's module, so that one without torch starts within half a second. It serves one
call, and ends by itself when this process is killed.
"""

import ctypes
import gc
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal that a process gets when the thread that started it ends


class BackgroundCall(Generic[T]):
    """A call that is being computed.

    what: names the work in errors, such as "scored an evaluation".
    function: of a module, by its name; it may raise what the user can correct (ValueError, OSError).
    arguments: can be pickled.
    """

    def __init__(self, what: str, function: Callable[..., T], *arguments: Any) -> None:
        self._what = what
        # Not pipes: a thread would have to feed them, and where memory is refused, its start may wait for ever.
        self._answer = os.fdopen(os.memfd_create("answer"), "w+b")
        with os.fdopen(os.memfd_create("request"), "w+b") as request:
            pickle.dump((function, arguments), request)
            request.seek(0)
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(os.getpid())],
                stdin=request,
                stdout=self._answer,
                start_new_session=True,  # Ctrl-C is for this process, which may still want the answer
            )

    def is_done(self) -> bool:
        """Return true once the process has ended, with or without a result."""
        return self._process.poll() is not None

    def result(self, timeout_s: float | None = None) -> T:
        """Wait for the result. Raises the function's error, or ChildProcessError when the process died or hangs."""
        try:
            status = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise ChildProcessError(f"the process that {self._what} took more than {timeout_s:g} s") from None
        if status != 0:
            raise ChildProcessError(f"the process that {self._what} ended with status {status}")
        self._answer.seek(0)
        answer = pickle.load(self._answer)
        if isinstance(answer, Exception):
            raise answer
        return answer


def _serve() -> None:
    """Answer the call on standard input with its result, or with an error that the user can correct."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):  # it was killed before that
        return
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # Slurm sends a step's signals to all of its processes
    function, arguments = pickle.load(sys.stdin.buffer)
    gc.disable()  # collecting takes longer than all the rest where a million annotations are read, and frees nothing
    answer: Any
    try:
        answer = function(*arguments)
    except (ValueError, OSError) as error:
        answer = error
    sys.stdout.buffer.write(pickle.dumps(answer, protocol=pickle.HIGHEST_PROTOCOL))
    sys.stdout.buffer.flush()
    os._exit(0)  # freeing what was read takes longer than ending


if __name__ == "__main__":
    _serve()
