"""File names in the folder of a run, in one place."""

from pathlib import Path

from ssd_fast.checkpoints.checkpoint import BEST, numbered_path


class RunFolder:
    """The folder of a run and the paths of what is in it."""

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

    def results(self) -> list[str]:
        """Names and patterns of all files of a run, relative to its folder."""
        files = set(vars(self).values()) - {self.path, self.checkpoints, self.tensorboard}
        return sorted(str(path.relative_to(self.path)) for path in files | {numbered_path(self.checkpoints, None)})

    def checkpoint(self, step: int) -> Path:
        """Path of the checkpoint after a number of steps."""
        return numbered_path(self.checkpoints, step)
