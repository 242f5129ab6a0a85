"""The log of a training run in MLPerf's own format.

The newest rules of mlperf_logging's compliance checker that know this detector are those of MLPerf Training 0.7 and
1.0 (`python -m mlperf_logging.compliance_checker --ruleset 1.0.0 mlperf.log`): 1.1 wants the initial tensors of the
MXNet implementation by name, and from 2.0 on the name "ssd" stands for RetinaNet. Besides the events below they demand
of a run in the closed division
- a mAP of at least 0.230 at one evaluation, which only training on COCO can mean;
- at least one warm-up step;
- two epochs or more at which the learning rate decays, the second of them a multiple of 5;
- 1 or 50 attempts per crop option (max_samples);
- at most 20 minutes (1.0: 30) from init_start to init_stop.
In the open division 1.0 takes any recipe and any mAP below 1. What one log cannot show is not checked: several runs
with different seeds, and a page cache that was cleared.
"""

import logging
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from mlperf_logging.mllog import constants
from mlperf_logging.mllog.mllog import MLLogger

_PROJECT_ROOT = Path(__file__).resolve().parents[2]
_CALLER = 2  # frames from the library's methods to whoever called the method of MlperfLog, which is what a line names


class MlperfLog:
    """A writer of a run's mlperf.log. Its methods are called in the order in which they are defined.

    Each line carries a time stamp in milliseconds and the file and line of the caller. Epochs count from 1. A block is
    the epochs up to and including the next evaluation; the log opens and closes blocks by itself.
    """

    def __init__(self, path: Path | None) -> None:
        """Open the log of one attempt. Logs of earlier attempts at the path are kept as mlperf.1.log, mlperf.2.log, …

        The checker wants exactly one initialisation and one run_start per file, and the time to train lies between
        run_start and run_stop: so an attempt that resumes another has a file, and a time, of its own.

        path: of the log, in an existing folder; None writes nothing (every rank but the first).
        Raises OSError naming the file where it cannot be written, now or at a later event.
        """
        # A logger outside logging's registry: no other handler sees its lines, and two logs in a process stay apart.
        self._logger = logging.Logger("mlperf", logging.INFO)
        if path is None:
            self._logger.addHandler(logging.NullHandler())
        else:
            self._logger.addHandler(_EventFile(_free(path), mode="w", encoding="utf-8"))
        self._events = MLLogger(self._logger, default_stack_offset=_CALLER, root_dir=re.escape(str(_PROJECT_ROOT)))
        self._evaluation_epochs: list[int] = []
        self._block_epoch: int | None = None
        self._evaluated_blocks: dict[int, int | None] = {}

    def init_start(
        self,
        *,
        organization: str,
        platform: str,
        division: Literal["closed", "open"],
    ) -> None:
        """Log who runs the benchmark on which platform, and the start of the initialisation.

        division: "closed" claims the benchmark's own recipe on COCO; anything else is "open".
        """
        for key, value in {
            constants.SUBMISSION_BENCHMARK: constants.SSD,
            constants.SUBMISSION_ORG: organization,
            constants.SUBMISSION_DIVISION: division,
            constants.SUBMISSION_STATUS: "onprem",
            constants.SUBMISSION_PLATFORM: platform,
            constants.CACHE_CLEAR: False,  # the checker takes either answer
        }.items():
            self._events.event(key, value)
        self._events.start(constants.INIT_START)

    def init_stop(
        self,
        *,
        seed: int,
        train_samples: int,
        eval_samples: int,
        global_batch_size: int,
        learning_rate: float,
        weight_decay: float,
        warmup_steps: int,
        decay_epochs: Sequence[float],
        bn_span: int,
        crop_attempts: int,
    ) -> None:
        """Log the figures of the recipe and the end of the initialisation.

        train_samples, eval_samples: images of an epoch of training and of an evaluation.
        learning_rate: after warm-up, before decay, for this global batch size.
        decay_epochs: epochs after which the learning rate decays.
        bn_span: images over which BatchNorm takes its statistics; the batch size of a rank, or of a group of them.
        crop_attempts: crops tried per option of the augmentation.
        """
        for key, value in {
            constants.SEED: seed,
            constants.TRAIN_SAMPLES: train_samples,
            constants.EVAL_SAMPLES: eval_samples,
            constants.GLOBAL_BATCH_SIZE: global_batch_size,
            constants.GRADIENT_ACCUMULATION_STEPS: 1,
            constants.OPT_BASE_LR: learning_rate,
            constants.OPT_WEIGHT_DECAY: weight_decay,
            constants.OPT_LR_WARMUP_STEPS: warmup_steps,
            constants.OPT_LR_WARMUP_FACTOR: 0,
            constants.OPT_LR_DECAY_BOUNDARY_EPOCHS: list(decay_epochs),
            constants.MODEL_BN_SPAN: bn_span,
            constants.MAX_SAMPLES: crop_attempts,
        }.items():
            self._events.event(key, value)
        self._events.end(constants.INIT_STOP)

    def run_start(self, *, evaluation_epochs: Iterable[int], resumed_epoch: int | None = None) -> None:
        """Log the start of the time to train, before any training data is read.

        evaluation_epochs: all epochs that end with an evaluation, the last epoch of the run among them.
        resumed_epoch: for an attempt that resumes another, the epoch it starts in; the line of the log tells it.
        """
        self._evaluation_epochs = sorted(evaluation_epochs)
        self._events.start(
            constants.RUN_START, metadata=None if resumed_epoch is None else {"resumed_epoch": resumed_epoch}
        )

    def epoch_start(self, epoch: int) -> None:
        """Log the start of an epoch, and of a block at the start of the run and after an evaluation."""
        if self._block_epoch is None:
            self._block_epoch = epoch
            last = next((e for e in self._evaluation_epochs if e >= epoch), epoch)
            self._events.start(
                constants.BLOCK_START,
                metadata={constants.FIRST_EPOCH_NUM: epoch, constants.EPOCH_COUNT: last - epoch + 1},
            )
        self._events.start(constants.EPOCH_START, metadata={constants.EPOCH_NUM: epoch})

    def epoch_stop(self, epoch: int) -> None:
        """Log the end of an epoch."""
        self._events.end(constants.EPOCH_STOP, metadata={constants.EPOCH_NUM: epoch})

    def eval_start(self, epoch: int) -> None:
        """Log the start of the evaluation after an epoch. The next epoch and block may start before its end."""
        self._evaluated_blocks[epoch], self._block_epoch = self._block_epoch, None
        self._events.start(constants.EVAL_START, metadata={constants.EPOCH_NUM: epoch})

    def eval_stop(self, epoch: int, mean_ap: float) -> None:
        """Log the COCO mAP (IoU 0.5 to 0.95, a fraction) of the evaluation after an epoch, and end its block."""
        self._events.event(constants.EVAL_ACCURACY, mean_ap, metadata={constants.EPOCH_NUM: epoch})
        self._events.end(constants.EVAL_STOP, metadata={constants.EPOCH_NUM: epoch})
        first_epoch = self._evaluated_blocks.pop(epoch)
        self._events.end(constants.BLOCK_STOP, metadata={constants.FIRST_EPOCH_NUM: first_epoch})

    def run_stop(self, *, success: bool) -> None:
        """Log the end of the time to train, and whether the run reached its target."""
        self._events.end(
            constants.RUN_STOP, metadata={constants.STATUS: constants.SUCCESS if success else constants.ABORTED}
        )

    def close(self) -> None:
        """Close the file. A log without run_stop belongs to a run that was cut off."""
        for handler in self._logger.handlers:
            handler.close()


class _EventFile(logging.FileHandler):
    """A log file whose errors reach the caller; `logging` itself would only print them."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exception()
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, self.baseFilename) from error
        raise


def _free(path: Path) -> Path:
    """The path, after an existing file was renamed to the first free name of name.1.log, name.2.log, …"""
    if path.exists():
        number = 1
        while (kept := path.with_suffix(f".{number}.log")).exists():
            number += 1
        path.rename(kept)
    return path
