"""COCO's numbers, computed by another process while this one continues training.

That process serves one evaluation. It starts within half a second, because it does not import torch, and it ends by
itself when this process is killed.
"""

import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

from ssd_fast.evaluation.coco_eval import CocoScores, DetectionTable, score, write_results


class ScoringRequest(NamedTuple):
    """Detections to be scored.

    category_ids: the ids of the annotation file that count.
    results_file: written with the detections, in COCO's result format.
    """

    annotation_file: Path
    table: DetectionTable
    category_ids: list[int]
    results_file: Path


class Scoring:
    """An evaluation whose score is being computed."""

    def __init__(self, request: ScoringRequest) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the run, which then waits for this score
        )
        self._answer = b""
        self._thread = threading.Thread(target=self._exchange, args=(request,), daemon=True)
        self._thread.start()

    def is_done(self) -> bool:
        """Return true once the process has ended, with or without a result."""
        return not self._thread.is_alive()

    def result(self, timeout_s: float) -> CocoScores:
        """Wait for the scores. Raises the error of scoring, or ChildProcessError when the process has died or hangs."""
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._process.kill()
            raise ChildProcessError(f"scoring an evaluation took more than {timeout_s:g} s")
        if self._process.returncode != 0:
            raise ChildProcessError(
                f"the process that scored an evaluation ended with status {self._process.returncode}"
            )
        answer = pickle.loads(self._answer)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _exchange(self, request: ScoringRequest) -> None:
        self._answer, _ = self._process.communicate(pickle.dumps(request))


def _serve() -> None:
    """Answer the request on standard input with CocoScores, or with an error that the user can correct."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # Slurm sends a step's signals to all of its processes
    try:
        request: ScoringRequest = pickle.load(sys.stdin.buffer)
    except (EOFError, pickle.UnpicklingError):  # the process that asks has ended
        return
    answer: CocoScores | Exception
    try:
        answer = score(request.annotation_file, request.table, category_ids=request.category_ids)
        write_results(request.table, request.results_file)
    except (ValueError, OSError) as error:
        answer = error
    sys.stdout.buffer.write(pickle.dumps(answer))


if __name__ == "__main__":
    _serve()
