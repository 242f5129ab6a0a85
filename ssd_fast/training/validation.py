"""Evaluations during training: the model detects, then another process scores while training continues."""

import itertools
import time
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

from dali_pipelines.batch import EvalBatch
from dali_pipelines.evaluate import EvalLoader
from ssd_fast.background import BackgroundCall
from ssd_fast.checkpoints.checkpoint import copy_checkpoint
from ssd_fast.data.coco import CocoSet
from ssd_fast.distributed.world import World
from ssd_fast.evaluation.coco_eval import CocoScores, twelve_numbers
from ssd_fast.evaluation.detector import Detector
from ssd_fast.evaluation.scoring import ScoringRequest, score_and_write
from ssd_fast.progress import track
from ssd_fast.training.folder import RunFolder
from ssd_fast.training.loop import Flags
from ssd_fast.training.scores import Scores

_POLL_S = 0.05


class Scored(NamedTuple):
    """The score of an evaluation.

    numbers: COCO's twelve. seconds: from the start of the evaluation to its score.
    """

    epoch: int
    numbers: dict[str, float]
    is_best: bool
    seconds: float


class Validation:
    """The evaluations of a run, of which at most one waits for its score.

    scores: of the evaluations that have one. pending_epoch: the epoch whose score is awaited, else 0.
    """

    def __init__(
        self,
        detector: Detector,
        val_set: CocoSet,
        loader: EvalLoader,
        world: World,
        folder: RunFolder,
        *,
        epochs: Collection[int],
        scores: Scores,
        timeout_s: float,
    ) -> None:
        """epochs: after which the model is evaluated. timeout_s: longest wait for a score."""
        self.scores = scores
        self.pending_epoch = 0
        self._detector = detector
        self._val_set = val_set
        self._loader = loader
        self._world = world
        self._folder = folder
        self._epochs = epochs
        self._timeout_s = timeout_s
        self._scoring: BackgroundCall[CocoScores] | None = None  # on rank 0, while an epoch is pending
        self._start_s = 0.0

    def is_due(self, epoch: int) -> bool:
        """Return true if an evaluation follows this epoch and has not been made."""
        return epoch in self._epochs and epoch not in (*self.scores.by_epoch, self.pending_epoch)

    def start(self, epoch: int, agree: Callable[[], Flags]) -> bool:
        """Detect on all validation images of this rank, then let another process score those of all ranks.

        agree: asks all ranks for their flags; called after each batch. Where one of them asks the run to stop, the
        evaluation is given up and False is returned.
        """
        assert not self.pending_epoch, "take the score of the evaluation before"
        self._start_s = time.perf_counter()
        batches = track(self._loader, "evaluating", len(self._loader))
        try:
            table = self._detector.detect_set(self._until_stopped(batches, agree), self._val_set, self._world)
        except _Stopped:
            return False
        self.pending_epoch = epoch
        if self._world.is_main:
            self._scoring = BackgroundCall(
                "scored an evaluation",
                score_and_write,
                ScoringRequest(
                    annotation_file=self._val_set.annotation_file,
                    table=table,
                    image_ids=self._val_set.images.image_ids.tolist(),
                    category_ids=self._detector.category_ids_in(self._val_set).tolist(),
                    results_file=self._folder.new_detections,
                ),
            )
        return True

    def _until_stopped(self, batches: Iterator[EvalBatch], agree: Callable[[], Flags]) -> Iterator[EvalBatch]:
        """The batches of this rank. All ranks ask equally often, also those with a batch less."""
        for _ in range(self._loader.most_batches):
            yield from itertools.islice(batches, 1)
            if agree().stop_signal:
                raise _Stopped

    def scored_epoch(self) -> int:
        """The pending epoch if its score is there, else 0; only rank 0 knows."""
        return self.pending_epoch if self._scoring is not None and self._scoring.is_done() else 0

    def wait(self, agree: Callable[[], Flags]) -> bool:
        """Wait for the score of the pending epoch; return False where a rank asks the run to stop before."""
        deadline = time.perf_counter() + self._timeout_s
        while time.perf_counter() < deadline:
            flags = agree()
            if flags.scored_epoch == self.pending_epoch:
                return True
            if flags.stop_signal:
                return False
            time.sleep(_POLL_S)
        return True  # take() says that it took too long

    def take(self) -> Scored:
        """Wait for the score of the pending epoch, on all ranks."""
        scores = self._scoring.result(self._timeout_s) if self._scoring else None
        numbers = self._world.broadcast(twelve_numbers(scores) if scores else {})
        epoch, self.pending_epoch, self._scoring = self.pending_epoch, 0, None
        is_best = self.scores.add(epoch, numbers, scores)
        return Scored(epoch, numbers, is_best, time.perf_counter() - self._start_s)

    def keep(self, scored: Scored, step: int) -> None:
        """Write the score, and keep checkpoint and detections of the best evaluation; step: that was evaluated.

        The score comes last: without it, a run that is killed here repeats the evaluation.
        """
        if scored.is_best:
            self._folder.new_detections.replace(self._folder.detections)
            copy_checkpoint(self._folder.checkpoint(step), self._folder.best)
        else:
            self._folder.new_detections.unlink()
        self.scores.write(self._folder.scores)

    def close(self) -> None:
        """End the loader's threads and free its buffers."""
        self._loader.close()


class _Stopped(Exception):
    """An evaluation was given up."""
