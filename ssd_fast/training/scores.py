"""Scores of the evaluations of a run. They decide which evaluation is the best."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from ssd_fast.evaluation.coco_eval import CocoScores
from ssd_fast.files import write_atomically

NO_MAP = -1.0


class BestCurves(NamedTuple):
    """Precision over recall of the best evaluation, by class name.

    per_class: COCO mAP. precision_50: 101 values each, at IoU 0.50 and recall 0, 0.01 ... 1.
    """

    epoch: int
    per_class: dict[str, float]
    precision_50: dict[str, list[float]]


class Scores:
    """COCO's twelve numbers of every evaluated epoch, and the curves of the best one.

    by_epoch: the numbers, by epoch (counted from 1); the same on all ranks.
    curves: of the best epoch; None before the first evaluation, and on ranks other than 0.
    val_set: what tells the validation set from others; empty for scores of an earlier version.
    uncompared_epoch: the last one that was scored on another validation set; it and those before cannot be the best.
    """

    def __init__(
        self, by_epoch: dict[int, dict[str, float]] | None = None, curves: BestCurves | None = None, val_set: str = ""
    ) -> None:
        self.by_epoch = dict(by_epoch or {})
        self.curves = curves
        self.val_set = val_set
        self.uncompared_epoch = 0

    def compare_after(self, epoch: int) -> None:
        """Compare only epochs after this one, because its validation set was another; 0 compares all."""
        self.uncompared_epoch = epoch
        if self.curves and self.curves.epoch <= epoch:
            self.curves = None

    @property
    def best_map(self) -> float:
        """COCO mAP of the best evaluation; -1 before the first one."""
        return max(self._compared(), default=NO_MAP)

    @property
    def num_since_best(self) -> int:
        """Number of evaluations after the best one."""
        maps = self._compared()
        return len(maps) - 1 - maps.index(max(maps)) if maps else 0

    def add(self, epoch: int, numbers: dict[str, float], scores: CocoScores | None) -> bool:
        """Add the evaluation after an epoch; return whether it is the best so far (the first of equals is).

        numbers: COCO's twelve. scores: all of them, on rank 0.
        """
        is_best = not self._compared() or numbers["map"] > self.best_map
        self.by_epoch[epoch] = numbers
        if is_best and scores is not None:
            columns = scores.precision_50.T.tolist()
            self.curves = BestCurves(epoch, scores.per_class, dict(zip(scores.per_class, columns, strict=True)))
        return is_best

    def _compared(self) -> list[float]:
        return [numbers["map"] for epoch, numbers in self.by_epoch.items() if epoch > self.uncompared_epoch]

    def write(self, path: Path) -> None:
        """Write everything as one JSON object; the file is replaced as a whole or not at all."""
        content: dict[str, Any] = {
            "epochs": self.by_epoch,
            "best": self.curves and self.curves._asdict(),
            "val_set": self.val_set,
            "uncompared_epoch": self.uncompared_epoch,
        }
        write_atomically(path, json.dumps(content).encode())


def read_scores(path: Path, *, until_epoch: int) -> Scores:
    """The scores in a file up to an epoch; none if there is no file.

    Raises ValueError, naming the file, where it does not hold scores.
    """
    if not path.exists():
        return Scores()
    try:
        content = json.loads(path.read_bytes())
        by_epoch = {int(epoch): numbers for epoch, numbers in content["epochs"].items() if int(epoch) <= until_epoch}
        curves = content["best"] and BestCurves(**content["best"])
        val_set = str(content.get("val_set", ""))
        uncompared_epoch = int(content.get("uncompared_epoch", 0))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: expected the scores of a run: {error}") from None
    scores = Scores(by_epoch, curves if curves and curves.epoch <= until_epoch else None, val_set)
    scores.compare_after(min(uncompared_epoch, until_epoch))
    return scores
