"""File names in the folder of a run, in one place."""

from pathlib import Path
from typing import Self

from ssd_fast.checkpoints.checkpoint import BEST, numbered_path
from ssd_fast.files import Claim


class RunFolder:
    """The folder of a run and the paths of what is in it; a context that ends with the claim on the folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.best = self.checkpoints / BEST
        self.recipe = path / "config.toml"
        self.log = path / "train.log"
        self.metrics = path / "metrics.jsonl"
        self.tensorboard = path / "tensorboard"
        self.mlperf_log = path / "mlperf.log"
        self.scores = path / "scores.json"
        self.detections = path / "detections.json"
        """Detections of the best evaluation, in COCO's result format."""
        self.new_detections = path / "detections.new.json"
        """Detections of an evaluation that has no score yet."""
        self.interrupted = path / "interrupted"
        """Present while a signal has stopped the run and --resume has not continued it."""
        self.curves_image = path / "curves.png"
        self.precision_recall_image = path / "precision_recall.png"
        self.detections_image = path / "detections.png"
        self._claim: Claim | None = None

    def claim(self) -> None:
        """Keep other runs out of the folder, if it exists. Raises ValueError that names the one that is in it."""
        if self._claim is None and self.path.is_dir():
            self._claim = Claim(self.path / "lock", f"{self.path}")

    def check_claim(self) -> None:
        """Raise OSError where the folder is no longer the one that was claimed."""
        if self._claim is not None:
            self._claim.check()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._claim is not None:
            self._claim.close()

    def results(self) -> list[str]:
        """Names and patterns of all files of a run, relative to its folder."""
        paths = {value for value in vars(self).values() if isinstance(value, Path)}
        files = paths - {self.path, self.checkpoints, self.tensorboard}
        return sorted(str(path.relative_to(self.path)) for path in files | {numbered_path(self.checkpoints, None)})

    def checkpoint(self, step: int) -> Path:
        """Path of the checkpoint after a number of steps."""
        return numbered_path(self.checkpoints, step)
