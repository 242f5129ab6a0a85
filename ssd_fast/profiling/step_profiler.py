"""The training step: its time alone and together with its input, by its parts, and the work that it does."""

import logging
import os
import tempfile
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from itertools import islice, pairwise
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity
from torch.utils.flop_counter import FlopCounterMode

from dali_pipelines.batch import TrainBatch
from dali_pipelines.synthetic import SyntheticTrainLoader
from ssd_fast import hardware
from ssd_fast.config.sections import Config
from ssd_fast.distributed.world import World
from ssd_fast.evaluation.detector import Detector
from ssd_fast.parts import INPUT, STEP_PARTS
from ssd_fast.profiling.dispatch import CallCounter
from ssd_fast.profiling.profile import BOTH, REST, STEP_ALONE, HostRead, Operator, Span, Stage, Work, add_parts
from ssd_fast.profiling.stopwatch import LEAST, Stopwatch
from ssd_fast.timing import NULL_TIMELINE, Timeline
from ssd_fast.training.loop import Flags, Loop
from ssd_fast.training.step import TrainStep

logger = logging.getLogger(__name__)

_WARM_UP_STEPS = {"cpu": 2, "cuda": 20}
_TRACED_STEPS = 3
_SHOWN_STEPS = 6  # of the timeline
_LONGEST_DOUBLED_S = 2.0  # a longer step has no use for a larger batch
_MOST_OPERATORS = 12
_ENDLESS = 10**9  # steps of an epoch of synthetic batches


class StepDetails(NamedTuple):
    """Facts about steps beside their times.

    peak_bytes: of memory in the first steps, None where it cannot be known.
    work: of one step. spans: parts of a few steps of the last turn.
    doubled: median seconds of the parts of a step with twice the images; empty where that was not measured.
    trace: a few steps as PyTorch's profiler records them, for Perfetto (gzip).
    """

    peak_bytes: int | None = None
    work: Work | None = None
    spans: tuple[Span, ...] = ()
    doubled: Mapping[str, float] = MappingProxyType({})
    trace: bytes = b""


class _Steps(NamedTuple):
    """samples: seconds of each part in every step. spans: the parts of the first few steps. busy: see `Lap`."""

    samples: dict[str, list[float]]
    spans: tuple[Span, ...]
    busy: float


class StepProfiler:
    """Times the steps that training runs, and counts what they do.

    planned: steps of each stage in a turn.
    """

    def __init__(
        self,
        config: Config,
        detector: Detector,
        world: World,
        clock: Stopwatch,
        batches: Iterator[TrainBatch] | None,
        stages: Collection[str],
    ) -> None:
        """detector: its network is trained.

        batches: the input, without end. stages: STEP_ALONE, on a synthetic batch, and BOTH, on batches of the input.
        """
        self.planned: dict[str, int] = {}
        self._config = config
        self._world = world
        self._clock = clock
        self._device = world.device()
        self._train_step = TrainStep(
            detector.model,
            config.optimizer,
            device=self._device,
            dtype=detector.dtype,
            world=world,
            distributed=config.distributed,
        )
        self._loop = Loop(self._train_step, config, steps_per_epoch=_ENDLESS)
        self._batches: dict[str, Iterator[TrainBatch]] = {}
        if STEP_ALONE in stages:
            self._batches[STEP_ALONE] = self._synthetic_batches(config.training.batch_size)
        if BOTH in stages:
            assert batches is not None
            self._batches[BOTH] = batches
        self._turns: dict[str, list[_Steps]] = {name: [] for name in self._batches}
        self._peak_bytes: int | None = None

    # ---- turns ----

    def warm_up(self) -> None:
        """Take the first steps, and watch how much memory they need."""
        logger.info("warming up")
        watched = hardware.reset_peak_memory(self._device)
        self._time(self._last_batches(), _WARM_UP_STEPS[self._device.type])
        self._peak_bytes = hardware.peak_memory(self._device) if watched else None

    def plan(self, turn_s: float) -> None:
        """Choose the number of steps for turns of turn_s seconds."""
        for name, batches in self._batches.items():
            (step_s,) = add_parts(self._time(batches, 1).samples)
            self.planned[name] = self._clock.repeats(turn_s, step_s)

    def take_turn(self) -> None:
        """Time all stages once more."""
        for name, batches in self._batches.items():
            self._turns[name].append(self._time(batches, self.planned[name]))

    def stages(self) -> list[Stage]:
        """The measured stages."""
        stages = []
        for name, turns in self._turns.items():
            samples = {part: [value for turn in turns for value in turn.samples[part]] for part in turns[0].samples}
            busy = median(turn.busy for turn in turns)
            stages.append(Stage.of(name, samples, images=self._loop.global_batch_size, busy=busy))
        return stages

    # ---- once ----

    def details(self) -> StepDetails:
        """Count the work of a step, record a few, and time some with twice the images; call it after the turns."""
        work = self.count_work()
        trace, traced = self._record()
        return StepDetails(
            peak_bytes=self._peak_bytes,
            work=work.model_copy(update=traced),
            spans=[steps[-1].spans for steps in self._turns.values()][-1],
            doubled=self._time_doubled() if STEP_ALONE in self._batches else {},
            trace=trace,
        )

    def count_work(self) -> Work:
        """Operations, bytes and host reads of a step, counted where they pass PyTorch's dispatcher."""
        batches = self._synthetic_batches(self._config.training.batch_size)
        images, dtype = next(batches).images, self._train_step.dtype
        with (
            torch.no_grad(),
            torch.autocast(self._device.type, dtype, dtype != torch.float32),
            FlopCounterMode(display=False) as forward,
        ):
            self._train_step.model(images.float())
        with FlopCounterMode(display=False) as step, CallCounter() as counter:
            next(self._loop.steps(batches, flags=Flags))
        return Work(
            forward_flop=forward.get_total_flops() / len(images),
            train_flop=step.get_total_flops() / len(images),
            bytes=counter.num_bytes,
            parameter_bytes=sum(parameter.nbytes for parameter in self._train_step.model.parameters()),
            host_reads=tuple(HostRead(place=place, times=times) for place, times in counter.host_reads.items()),
        )

    def _record(self) -> tuple[bytes, dict[str, Any]]:
        """A trace of a few steps of the last stage, and the fields of `Work` that it gives."""
        on_gpu = self._device.type == "cuda"
        os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # without a GPU it would report an error that is none
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        with torch.profiler.profile(activities=activities, acc_events=True) as recorder:
            self._time(self._last_batches(), _TRACED_STEPS)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "trace.json.gz")
            recorder.export_chrome_trace(str(path))
            content = path.read_bytes()
        return content, _read_trace(list(recorder.events()), on_gpu=on_gpu)

    def _time_doubled(self) -> dict[str, float]:
        """Median seconds of the parts of a step with twice the images.

        Empty where so many do not fit into the GPU, or where a step takes so long that they are of no use.
        """
        step_s = median(total for steps in self._turns[STEP_ALONE] for total in add_parts(steps.samples))
        worth = step_s < _LONGEST_DOUBLED_S
        if self._device.type == "cuda":
            worth &= 2 * (self._peak_bytes or 0) < torch.cuda.get_device_properties(self._device).total_memory
        if not self._world.broadcast(worth):
            return {}
        logger.info("%s, with twice the images", STEP_ALONE)
        batches = self._synthetic_batches(2 * self._config.training.batch_size)
        self._time(batches, _WARM_UP_STEPS[self._device.type])
        samples = self._time(batches, 3 * LEAST).samples
        return {part: median(seconds) for part, seconds in samples.items()}

    def _last_batches(self) -> Iterator[TrainBatch]:
        return list(self._batches.values())[-1]

    def _synthetic_batches(self, batch_size: int) -> Iterator[TrainBatch]:
        """One batch, again and again."""
        return SyntheticTrainLoader(
            num_anchors=self._train_step.model.num_anchors,
            num_classes=self._train_step.model.num_classes,
            image_size=self._config.model.image_size,
            batch_size=batch_size,
            device=self._device,
            steps_per_epoch=_ENDLESS,
            seed=self._config.training.seed,
        ).epoch()

    def _time(self, batches: Iterator[TrainBatch], num_steps: int) -> _Steps:
        self._clock.settle()
        for _ in range(self._config.data.prefetch_batches + 1):  # these were ready, or nearly so
            next(batches)
        timeline = self._train_step.timeline = Timeline(self._device, time.perf_counter())
        timeline.settle("before")
        self._clock.start()
        for _ in islice(self._loop.steps(batches, flags=Flags), num_steps):
            pass
        with timeline.region(REST):  # marks where the last step ends
            pass
        timeline.settle("after")
        busy = self._clock.stop().busy
        self._train_step.timeline = NULL_TIMELINE
        begins = [begin for part, begin, _ in timeline.intervals if part in (INPUT, REST)]
        samples = {part: timeline.parts()[part] for part in (INPUT, *STEP_PARTS)}
        samples[REST] = [
            end - begin - in_parts for (begin, end), in_parts in zip(pairwise(begins), add_parts(samples), strict=True)
        ]
        first, until = begins[0], begins[min(_SHOWN_STEPS, num_steps)]
        spans = tuple(
            Span(part=part, begin_s=begin - first, end_s=end - first)
            for part, begin, end in timeline.intervals
            if begin < until
        )
        return _Steps(samples, spans, busy)


def _read_trace(events: list[Any], *, on_gpu: bool) -> dict[str, Any]:
    """Fields of `Work`: the operators that take longest, and on a GPU how busy it was and its layout conversions."""
    kernels = [event for event in events if not event.is_user_annotation]
    if on_gpu:
        kernels = [event for event in kernels if event.device_type == torch.autograd.DeviceType.CUDA]
    seconds: Counter[str] = Counter()
    for event in kernels:
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        seconds[event.name] += spent / 1e6 / _TRACED_STEPS
    operators = tuple(Operator(name=name, seconds=spent) for name, spent in seconds.most_common(_MOST_OPERATORS))
    if not on_gpu:
        return {"operators": operators}
    first = min(event.time_range.start for event in events if event.name == INPUT)
    ranges = [(event.time_range.start, event.time_range.end) for event in kernels if event.time_range.start >= first]
    layouts = sum("nchwToNhwc" in event.name or "nhwcToNchw" in event.name for event in kernels)
    return {"operators": operators, "gpu_busy": _covered(ranges), "layout_kernels": layouts / _TRACED_STEPS}


def _covered(ranges: list[tuple[float, float]]) -> float | None:
    """Share of the time between the first begin and the last end that lies in a range; None without ranges."""
    if not ranges:
        return None
    covered, reached = 0.0, min(begin for begin, _ in ranges)
    first = reached
    for begin, end in sorted(ranges):
        covered += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return covered / (reached - first)
