"""The history of a run for other tools: metrics.jsonl and TensorBoard."""

import json
import logging
import math
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ssd_fast.files import write_atomically
from ssd_fast.training.folder import RunFolder

_logger = logging.getLogger(__name__)

_TENSORBOARD_TAGS = {"loss": "loss/total", "box_loss": "loss/box", "class_loss": "loss/class"}


class MetricsWriter:
    """A writer of a run's metrics.jsonl, one JSON object per line, and of its files for TensorBoard.

    Lines of training have kind "train" and the keys step, epoch, loss, box_loss, class_loss, learning_rate and
    images_per_second; lines of an evaluation have kind "eval", step, epoch and the names of the scores. A figure that
    is not finite is null. Every line is written at once: a killed process leaves at most one incomplete line.
    """

    def __init__(self, folder: RunFolder, *, resume_step: int | None, scored_epochs: Collection[int]) -> None:
        """Open the history of a run.

        resume_step: the step that the run resumes from. Records of later steps are dropped; None drops all.
        scored_epochs: epochs whose scores are known. Records of other evaluations are dropped: they are repeated.
        Raises OSError naming the file where it cannot be written.
        """
        self._path = folder.metrics
        kept = _lines_until(self._path, resume_step, scored_epochs)
        write_atomically(self._path, "".join(line + "\n" for line in kept).encode())
        self._file = self._path.open("ab", buffering=0)
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and readers of a history do without

        self._plots_dir = folder.tensorboard
        self._tensorboard = SummaryWriter(
            str(self._plots_dir), purge_step=0 if resume_step is None else resume_step + 1
        )

    def train(
        self,
        step: int,
        epoch: float,
        loss: float,
        box_loss: float,
        class_loss: float,
        learning_rate: float,
        images_per_second: float,
    ) -> None:
        """Record the figures of a training step.

        step: steps done since the beginning of the run, this one included.
        epoch: epochs done, with their fraction.
        loss: box_loss + class_loss, means over the images.
        images_per_second: over all ranks.
        """
        figures = {
            "loss": loss,
            "box_loss": box_loss,
            "class_loss": class_loss,
            "learning_rate": learning_rate,
            "images_per_second": images_per_second,
        }
        self._append({"kind": "train", "step": step, "epoch": epoch, **figures})
        self._plot({_TENSORBOARD_TAGS.get(name, name): value for name, value in figures.items()}, step)

    def evaluation(self, step: int, epoch: int, scores: Mapping[str, float]) -> None:
        """Record the scores of the evaluation after `step` steps and `epoch` epochs, by name."""
        figures = {name: float(score) for name, score in scores.items()}
        self._append({"kind": "eval", "step": step, "epoch": epoch, **figures})
        self._plot({f"eval/{name}": value for name, value in figures.items()}, step)

    def close(self) -> None:
        """Write everything and close the files."""
        self._file.close()
        with _errors_naming(self._plots_dir):
            self._tensorboard.close()

    def _append(self, record: Mapping[str, Any]) -> None:
        valid = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        with _errors_naming(self._path):
            rest = json.dumps(valid, allow_nan=False).encode() + b"\n"
            while rest:  # a disk that is nearly full takes a part of it
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())  # before the checkpoint that a crashed run resumes from

    def _plot(self, curves: Mapping[str, float], step: int) -> None:
        with _errors_naming(self._plots_dir):
            for tag, value in curves.items():
                self._tensorboard.add_scalar(tag, value, step)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Records of a metrics.jsonl, in order. Incomplete lines, of a killed process, are left out with a warning."""
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            record = json.loads(line)
            step = record["step"]
        except (ValueError, TypeError, KeyError):
            step = None
        if isinstance(step, int):
            records.append(record)
        else:
            _logger.warning("%s, line %d: not a record of a step, left out", path, number)
    return records


def _lines_until(path: Path, step: int | None, scored_epochs: Collection[int]) -> list[str]:
    if step is None or not path.exists():
        return []
    return [
        json.dumps(record)
        for record in read_metrics(path)
        if record["step"] <= step and (record.get("kind") != "eval" or record["epoch"] in scored_epochs)
    ]


@contextmanager
def _errors_naming(path: Path) -> Iterator[None]:
    """A context that adds the name of the file to errors of writing."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
