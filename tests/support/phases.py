"""What a training run is doing, as far as its files tell."""

import json
from contextlib import suppress
from pathlib import Path

PHASES = ("start", "training", "evaluation", "saving")


def log_size(run: Path) -> int:
    """Size of the run's log, which a start of the run leaves as it is until it trains."""
    log = run / "train.log"
    return log.stat().st_size if log.exists() else 0


def phase_of(run: Path, log_from: int = 0) -> str:
    """One of PHASES. log_from: size of the log before this start of the run."""
    while True:
        with suppress(FileNotFoundError):  # the run has renamed a file meanwhile
            return _phase_of(run, log_from)


def _phase_of(run: Path, log_from: int) -> str:
    folder = run / "checkpoints"
    if folder.is_dir() and any(path.name.endswith(".unfinished") for path in folder.iterdir()):
        return "saving"
    logs = sorted(run.glob("mlperf*.log"), key=lambda path: path.stat().st_mtime_ns)
    if log_size(run) == log_from or not logs:
        return "start"
    complete = logs[-1].read_text().rpartition("\n")[0].splitlines()
    events = [json.loads(line.partition(" ")[2])["key"] for line in complete if "{" in line]
    if "run_start" not in events:
        return "start"
    last = next((key for key in reversed(events) if key in ("eval_start", "epoch_start", "eval_stop")), "")
    return "evaluation" if last == "eval_start" else "training"
