"""The input alone: how fast it makes batches, and how long each of its parts takes.

A pipeline is timed for each part, which ends after that part. The time of a part is the difference between its pipeline
and the one before.
"""

from collections.abc import Callable, Iterator
from functools import partial
from statistics import median

from dali_pipelines.augment import PIXEL_PARTS
from dali_pipelines.batch import TrainBatch
from dali_pipelines.train import CutInput
from ssd_fast.config.sections import Config
from ssd_fast.data.coco import CocoSet
from ssd_fast.data.loaders import loader_arguments
from ssd_fast.distributed.world import World
from ssd_fast.model.anchors import model_anchors
from ssd_fast.profiling.profile import INPUT_ALONE, Stage
from ssd_fast.profiling.stopwatch import LEAST, Lap, Stopwatch

ENCODING = "encode, hand over"

_REPEATS = 3  # of each pipeline in a turn: differences suffer most from a machine whose speed varies


class InputProfiler:
    """Times the input of a rank.

    planned: batches of each pipeline in a turn, by the part that it ends with.
    """

    def __init__(
        self, config: Config, train_set: CocoSet, batches: Iterator[TrainBatch], world: World, clock: Stopwatch
    ) -> None:
        """batches: the whole input, without end."""
        self.planned: dict[str, int] = {}
        self._clock = clock
        self._num_prefetched = config.data.prefetch_batches
        self._images = config.training.batch_size * world.size
        arguments = loader_arguments(config, train_set, model_anchors(config.model), world.device(), world)
        self._make_batch: dict[str, Callable[[], object]] = {}
        for number, part in enumerate(PIXEL_PARTS, start=1):
            # Each pipeline has an order of its own, so that it does not find in memory what another has just read.
            cut = CutInput(part, **arguments | {"seed": arguments["seed"] + number})
            self._make_batch[part] = cut.run_batch
        self._make_batch[ENCODING] = partial(next, batches)
        self._laps: dict[str, list[Lap]] = {part: [] for part in self._make_batch}

    def plan(self, turn_s: float) -> None:
        """Choose the number of batches for turns of turn_s seconds."""
        each_s = turn_s / (_REPEATS * len(self._make_batch))
        self.planned = {
            part: self._clock.repeats(each_s, self._time(make, LEAST).seconds)
            for part, make in self._make_batch.items()
        }

    def take_turn(self) -> None:
        """Time all pipelines once more."""
        for _ in range(_REPEATS):
            for part, make in self._make_batch.items():
                self._laps[part].append(self._time(make, self.planned[part]))

    def stages(self) -> list[Stage]:
        """The stage INPUT_ALONE; its samples are means over the batches of one lap."""
        samples: dict[str, list[float]] = {}
        before = [0.0] * len(self._laps[ENCODING])
        for part, laps in self._laps.items():
            until = [lap.seconds for lap in laps]
            samples[part] = [end - begin for begin, end in zip(before, until, strict=True)]
            before = until
        busy = median(lap.busy for lap in self._laps[ENCODING])
        return [Stage.of(INPUT_ALONE, samples, images=self._images, busy=busy)]

    def _time(self, make: Callable[[], object], num_batches: int) -> Lap:
        """Time of one batch, on average."""
        self._clock.settle()
        for _ in range(self._num_prefetched + 1):  # these were ready, or nearly so
            make()
        self._clock.start()
        for _ in range(num_batches):
            make()
        lap = self._clock.stop()
        return lap._replace(seconds=lap.seconds / num_batches)
