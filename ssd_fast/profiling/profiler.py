"""Where the time of training and of evaluation goes, measured on what they run: the same loop, step and pipelines.

The stages take turns (input, step, both, input, ...), so that a machine that becomes slower does so for all of them.
The step's parts are marked where it runs, on the clock of the device; those of the input are differences between
pipelines that end after one more part each. With several ranks all do the same at the same time; the times are
rank 0's, beside a few of every rank.
"""

import json
import logging
import os
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from itertools import chain, islice, pairwise, repeat
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity
from torch.utils.flop_counter import FlopCounterMode

from dali_pipelines.batch import TrainBatch
from dali_pipelines.synthetic import SyntheticTrainLoader
from dali_pipelines.train import PIXEL_PARTS, CutInput
from ssd_fast import hardware
from ssd_fast.config import Config
from ssd_fast.data.coco import NUMBERED_CATEGORIES
from ssd_fast.data.loaders import load_sets, loader_arguments, make_eval_loader, make_train_loader
from ssd_fast.distributed.world import World
from ssd_fast.evaluation import coco_eval
from ssd_fast.evaluation.detector import load_detector, make_random_detector
from ssd_fast.model.anchors import model_anchors
from ssd_fast.parts import ALLREDUCE, BACKWARD, DECODING, FORWARD, INPUT, MODEL, PREPROCESSING, STEP_PARTS
from ssd_fast.profiling.bottleneck import find_bottlenecks
from ssd_fast.profiling.dispatch import CallCounter
from ssd_fast.profiling.profile import (
    BOTH,
    EVALUATION,
    INPUT_ALONE,
    REST,
    STEP_ALONE,
    HostRead,
    Machine,
    Operator,
    Part,
    Profile,
    Rank,
    Span,
    Stage,
    Work,
)
from ssd_fast.timing import NULL_TIMELINE, Timeline
from ssd_fast.training.loop import Flags, Loop
from ssd_fast.training.step import TrainStep

logger = logging.getLogger(__name__)

ENCODING = "encode, hand over"
COLLECTING, SCORING = "collect", "score"

_ROUNDS = 3
_INPUT_TURNS = 3  # of each pipeline in a round: its parts are differences, which suffer most from a machine's moods
_LEAST, _MOST = 2, 100  # batches or steps of a round
_WARM_UP_STEPS = {"cpu": 2, "cuda": 20}
_TRACED_STEPS = 3
_SHOWN_STEPS = 6  # of the timeline
_LONGEST_DOUBLED_S = 2.0  # a longer step has no use for a larger batch
_OPERATORS = 12  # listed
_ENDLESS = 10**9  # steps of an epoch of synthetic batches

Batches = Iterator[TrainBatch]


class _Batches(NamedTuple):
    """seconds: of each of some batches, on average. busy: share of the time that the cores worked."""

    seconds: float
    busy: float


class _Steps(NamedTuple):
    """samples: seconds of each part of every step. spans: of the first few steps."""

    samples: dict[str, list[float]]
    spans: list[Span]
    busy: float

    def seconds(self) -> list[float]:
        """Of every step."""
        return [sum(parts) for parts in zip(*self.samples.values(), strict=True)]


class Profiler:
    """What is measured: a trainer, its input, and a detector with the same network."""

    def __init__(
        self, config: Config, data: Path | None, world: World, *, seconds: float, checkpoint: Path | None = None
    ) -> None:
        """data: folder in COCO's layout; left out, only the step alone can be measured, with 80 classes.

        seconds: for every stage, or a few steps.
        checkpoint: whose weights to take; left out, random ones, which detect next to nothing.
        Raises ValueError and OSError as training does.
        """
        self.config = config
        self.world = world
        self.device = world.device()
        self.seconds = seconds
        self.sets = load_sets(config, data) if data else None
        categories = self.sets[0].categories if self.sets else NUMBERED_CATEGORIES
        if checkpoint:
            self.detector, _ = load_detector(checkpoint, self.device, config=config, categories=categories)
        else:
            self.detector = make_random_detector(config, categories, self.device)
        self.trainer = TrainStep(
            *(self.detector.model, config.optimizer),
            device=self.device,
            dtype=self.detector.dtype,
            world=world,
            distributed=config.distributed,
        )
        self.loop = Loop(self.trainer, config, steps_per_epoch=_ENDLESS)
        self.trace = b""
        """A few steps of this rank as PyTorch's profiler records them, for Perfetto (gzip); empty before `profile`."""

    def profile(self, stages: Collection[str], recipe: str) -> Profile:
        """The report; complete on rank 0, on the others without findings.

        stages: of INPUT_ALONE, STEP_ALONE, BOTH and EVALUATION.
        recipe: its name.
        """
        synthetic = self._synthetic_batches(self.config.training.batch_size)
        real = self._real_batches() if {INPUT_ALONE, BOTH} & set(stages) else synthetic
        work = peak_bytes = None
        doubled: dict[str, float] = {}
        measured: list[Stage] = []
        spans: list[Span] = []
        if {STEP_ALONE, BOTH} & set(stages):
            logger.info("warming up")
            watched = hardware.reset_peak_memory(self.device)
            self._time_steps(real, _WARM_UP_STEPS[self.device.type])
            peak_bytes = hardware.peak_memory(self.device) if watched else None
            work = self._count(synthetic)
        if {INPUT_ALONE, STEP_ALONE, BOTH} & set(stages):
            measured, spans = self._take_turns(stages, synthetic, real)
        if work:
            work = self._trace(real if BOTH in stages else synthetic, work)
        if STEP_ALONE in stages and self._has_room_for_twice(measured, peak_bytes):
            doubled = self._double_batch()
        if EVALUATION in stages:
            evaluated = self._evaluate()
            measured += [evaluated] if evaluated else []
        report = Profile(
            machine=self._machine(peak_bytes),
            config=self.config.model_dump(mode="json", exclude_none=True),
            recipe=recipe,
            batch_size=self.config.training.batch_size,
            stages=tuple(measured),
            spans=tuple(spans),
            work=work,
            doubled=doubled,
            ranks=tuple(self.world.gather(_rank(measured))),
            findings=(),
        )
        if not self.world.is_main:
            return report
        return report.model_copy(update={"findings": tuple(find_bottlenecks(report))})

    # ---- input, step, both ----

    def _take_turns(self, stages: Collection[str], synthetic: Batches, real: Batches) -> tuple[list[Stage], list[Span]]:
        """Stages in their order, and a few steps' spans of the last one."""
        inputs = self._inputs(real) if INPUT_ALONE in stages else {}
        trained = {name: batches for name, batches in ((STEP_ALONE, synthetic), (BOTH, real)) if name in stages}
        numbers = {
            name: self._number_of(_INPUT_TURNS * len(inputs) * self._time_input(make, _LEAST).seconds)
            for name, make in inputs.items()
        }
        for name, batches in trained.items():
            numbers[name] = self._number_of(median(self._time_steps(batches, 1).seconds()))
        made: dict[str, list[_Batches]] = {name: [] for name in inputs}
        taken: dict[str, list[_Steps]] = {name: [] for name in trained}
        for turn in range(_ROUNDS):
            logger.info(
                "round %d of %d: %s",
                *(turn + 1, _ROUNDS, ", ".join(f"{number} x {name}" for name, number in numbers.items())),
            )
            for name, make in _INPUT_TURNS * [*inputs.items()]:
                made[name].append(self._time_input(make, numbers[name]))
            for name, batches in trained.items():
                taken[name].append(self._time_steps(batches, numbers[name]))
        images = self.loop.global_batch_size
        found = [_input_stage(made, images)] if made else []
        found += [_step_stage(name, rounds, images) for name, rounds in taken.items()]
        return found, next((rounds[-1].spans for rounds in reversed(taken.values())), [])

    def _number_of(self, seconds: float) -> int:
        """Batches or steps of a round, if one took so long; the same on all ranks."""
        return self.world.broadcast(round(min(max(self.seconds / _ROUNDS / seconds, _LEAST), _MOST)))

    def _inputs(self, real: Batches) -> dict[str, Callable[[], object]]:
        """What makes the next batch up to each part of the input; last, all of it."""
        assert self.sets is not None
        arguments = loader_arguments(
            self.config, self.sets[0], model_anchors(self.config.model), self.device, self.world
        )
        # in orders of their own, so that no pipeline finds in memory what another has just read
        cuts = [
            CutInput(part, **arguments | {"seed": arguments["seed"] + 1 + number})
            for number, part in enumerate(PIXEL_PARTS)
        ]
        return {part: cut.run_batch for part, cut in zip(PIXEL_PARTS, cuts, strict=True)} | {
            ENCODING: lambda: next(real)
        }

    def _real_batches(self) -> Batches:
        """Without end."""
        assert self.sets is not None
        anchors_cxcywh = model_anchors(self.config.model)
        loader = make_train_loader(self.config, self.sets[0], anchors_cxcywh, self.device, self.world)
        return chain.from_iterable(loader.epoch() for _ in repeat(None))

    def _synthetic_batches(self, batch_size: int) -> Batches:
        """One batch without end."""
        return SyntheticTrainLoader(
            num_anchors=self.trainer.model.num_anchors,
            num_classes=self.trainer.model.num_classes,
            image_size=self.config.model.image_size,
            batch_size=batch_size,
            device=self.device,
            steps_per_epoch=_ENDLESS,
            seed=self.config.training.seed,
        ).epoch()

    def _time_input(self, make: Callable[[], object], num_batches: int) -> _Batches:
        self._settle()
        for _ in range(self.config.data.prefetch_batches + 1):  # those were ready, or nearly so
            make()
        self._synchronize()
        clock = _Clock(self.world.cores)
        for _ in range(num_batches):
            make()
        self._synchronize()
        return _Batches(clock.seconds() / num_batches, clock.busy())

    def _time_steps(self, batches: Batches, num_steps: int) -> _Steps:
        self._settle()
        for _ in range(self.config.data.prefetch_batches + 1):
            next(batches)
        timeline = self.trainer.timeline = Timeline(self.device, time.perf_counter())
        timeline.settle("before")
        clock = _Clock(self.world.cores)
        for _ in islice(self.loop.steps(batches, flags=Flags), num_steps):
            pass
        with timeline.region(REST):  # marks where the last step ends
            pass
        timeline.settle("after")
        busy = clock.busy()
        self.trainer.timeline = NULL_TIMELINE
        spans = [Span(part=part, begin_s=begin, end_s=end) for part, begin, end in timeline.intervals]
        begins = [span.begin_s for span in spans if span.part in (INPUT, REST)]
        samples = {part: timeline.parts()[part] for part in (INPUT, *STEP_PARTS)}
        in_parts = [sum(parts) for parts in zip(*samples.values(), strict=True)]
        samples[REST] = [end - begin - known for (begin, end), known in zip(pairwise(begins), in_parts, strict=True)]
        until = begins[min(_SHOWN_STEPS, num_steps)]
        shown = [
            Span(part=span.part, begin_s=span.begin_s - begins[0], end_s=span.end_s - begins[0])
            for span in spans
            if span.begin_s < until
        ]
        return _Steps(samples, shown, busy)

    def _has_room_for_twice(self, measured: list[Stage], peak_bytes: int | None) -> bool:
        """Whether a step with twice the images is worth its time, and fits into a GPU; the same on all ranks."""
        step_s = next(stage.whole.median_s for stage in measured if stage.name == STEP_ALONE)
        fits = True
        if self.device.type == "cuda":
            fits = 2 * (peak_bytes or 0) < torch.cuda.get_device_properties(self.device).total_memory
        return self.world.broadcast(fits and step_s < _LONGEST_DOUBLED_S)

    def _double_batch(self) -> dict[str, float]:
        """Median seconds of the parts of a step with twice the images."""
        logger.info("%s, with twice the images", STEP_ALONE)
        batches = self._synthetic_batches(2 * self.config.training.batch_size)
        self._time_steps(batches, _WARM_UP_STEPS[self.device.type])
        found = self._time_steps(batches, 3 * _LEAST)
        return {part: median(seconds) for part, seconds in found.samples.items()}

    def _count(self, batches: Batches) -> Work:
        """What the dispatcher sees of a step."""
        images = next(batches).images
        with (
            torch.no_grad(),
            torch.autocast(self.device.type, self.trainer.dtype, self.trainer.dtype != torch.float32),
            FlopCounterMode(display=False) as forward,
        ):
            self.trainer.model(images.float())
        with FlopCounterMode(display=False) as step, CallCounter() as counter:
            next(self.loop.steps(batches, flags=Flags))
        return Work(
            forward_flop=forward.get_total_flops() / len(images),
            train_flop=step.get_total_flops() / len(images),
            bytes=counter.num_bytes,
            parameter_bytes=sum(parameter.nbytes for parameter in self.trainer.model.parameters()),
            host_reads=tuple(HostRead(place=place, times=times) for place, times in counter.host_reads.items()),
        )

    def _trace(self, batches: Batches, work: Work) -> Work:
        """The work, with what PyTorch's profiler sees of a few steps."""
        on_gpu = self.device.type == "cuda"
        os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # without a GPU it reports an error, which is none
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        with torch.profiler.profile(activities=activities, acc_events=True) as recorder:
            self._time_steps(batches, _TRACED_STEPS)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "trace.json.gz")
            recorder.export_chrome_trace(str(path))
            self.trace = path.read_bytes()
        events = [event for event in recorder.events() if not event.is_user_annotation]
        if on_gpu:
            events = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
        seconds: Counter[str] = Counter()
        for event in events:
            spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            seconds[event.name] += spent / 1e6 / _TRACED_STEPS
        found: dict[str, Any] = {
            "operators": tuple(Operator(name=name, seconds=spent) for name, spent in seconds.most_common(_OPERATORS))
        }
        if on_gpu:
            first = min(event.time_range.start for event in recorder.events() if event.name == INPUT)
            kernels = [(event.time_range.start, event.time_range.end) for event in events]
            found["gpu_busy"] = _covered([kernel for kernel in kernels if kernel[0] >= first])
            layouts = sum("nchwToNhwc" in event.name or "nhwcToNchw" in event.name for event in events)
            found["layout_kernels"] = layouts / _TRACED_STEPS
        return work.model_copy(update=found)

    # ---- evaluation ----

    def _evaluate(self) -> Stage | None:
        """As many validation images as there is time for; None on ranks other than 0, which may have no batch."""
        assert self.sets is not None
        val_set = self.sets[1]
        logger.info("evaluation")
        loader = make_eval_loader(self.config, val_set.images, self.device, world=self.world)
        self._settle()
        begin = time.perf_counter()
        self.detector.detect_all(islice(loader, 1))
        seconds = time.perf_counter() - begin
        num_batches = self.world.broadcast(min(max(round(self.seconds / seconds), 1), len(loader)))
        self._settle()
        clock = _Clock(self.world.cores)
        timeline = Timeline(self.device, time.perf_counter())
        timeline.settle("before")
        table = self.detector.detect_set(islice(loader, num_batches), val_set, self.world, timeline)
        timeline.settle(COLLECTING)
        busy = clock.busy()
        loader.close()
        if not self.world.is_main:
            return None
        num_images = min(
            num_batches * self.world.size * self.config.evaluation.batch_size, len(val_set.images.image_ids)
        )
        with tempfile.TemporaryDirectory() as folder:
            annotations = Path(folder, "measured.json")
            _write_part(val_set.annotation_file, val_set.images.image_ids[:num_images].tolist(), annotations)
            category_ids = self.detector.category_ids_in(val_set).tolist()
            begin = time.perf_counter()
            coco_eval.score(annotations, table, category_ids=category_ids)
            scoring_s = time.perf_counter() - begin
        samples = {part: timeline.parts()[part] for part in (PREPROCESSING, MODEL, DECODING)}
        num_batches = len(samples[MODEL])
        samples[COLLECTING] = [timeline.parts()[COLLECTING][0] / num_batches] * num_batches
        samples[SCORING] = [scoring_s / num_batches] * num_batches
        images = num_images / num_batches
        return _stage(EVALUATION, samples, images, busy)

    # ---- all of it ----

    def _machine(self, peak_bytes: int | None) -> Machine:
        self._settle()
        dtype = self.trainer.dtype
        return Machine(
            device=hardware.device_name(self.device, self.world.cores),
            is_gpu=self.device.type == "cuda",
            ranks=self.world.size,
            cores=self.world.cores,
            torch=torch.__version__,
            dtype=str(dtype).removeprefix("torch."),
            matrix_flop_per_s=hardware.matrix_rate(self.device, dtype),
            bf16_flop_per_s=hardware.matrix_rate(self.device, torch.bfloat16),
            copy_bytes_per_s=hardware.copy_rate(self.device),
            peak_bytes=peak_bytes,
        )

    def _settle(self) -> None:
        """Waits until nothing is being prepared any more, on any rank."""
        self._synchronize()
        deadline, quiet = time.perf_counter() + 5, 0
        while quiet < 3 and time.perf_counter() < deadline:
            before = time.process_time()
            time.sleep(0.01)
            quiet = quiet + 1 if time.process_time() - before < 0.002 else 0
        self.world.broadcast(None)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class _Clock:
    """Real time, and how much of it the process's cores worked."""

    def __init__(self, cores: int) -> None:
        self._cores = cores
        self._begin, self._begin_cpu = time.perf_counter(), time.process_time()

    def seconds(self) -> float:
        return time.perf_counter() - self._begin

    def busy(self) -> float:
        return (time.process_time() - self._begin_cpu) / self.seconds() / self._cores


def _stage(name: str, samples: dict[str, list[float]], images: float, busy: float) -> Stage:
    return Stage(
        name=name,
        whole=Part.of(name, [sum(parts) for parts in zip(*samples.values(), strict=True)]),
        parts=tuple(Part.of(part, seconds) for part, seconds in samples.items()),
        images=images,
        busy=busy,
        samples=samples,
    )


def _step_stage(name: str, rounds: list[_Steps], images: int) -> Stage:
    samples = {part: [value for steps in rounds for value in steps.samples[part]] for part in rounds[0].samples}
    return _stage(name, samples, images, median(steps.busy for steps in rounds))


def _input_stage(made: dict[str, list[_Batches]], images: int) -> Stage:
    """Of pipelines that end after one more part each: a part is what the pipeline with it takes longer, per turn."""
    samples: dict[str, list[float]] = {}
    before = [0.0] * len(made[ENCODING])
    for part, turns in made.items():
        until = [batches.seconds for batches in turns]
        samples[part] = [end - begin for begin, end in zip(before, until, strict=True)]
        before = until
    return _stage(INPUT_ALONE, samples, images, median(batches.busy for batches in made[ENCODING]))


def _rank(stages: list[Stage]) -> Rank:
    by_name = {stage.name: stage for stage in stages}
    alone, both, fed = (by_name.get(name) for name in (STEP_ALONE, BOTH, INPUT_ALONE))
    steps = alone or both
    return Rank(
        host=socket.gethostname(),
        input_s=fed and fed.whole.median_s,
        step_s=steps and steps.whole.median_s,
        compute_s=steps and steps.seconds(FORWARD) + steps.seconds(BACKWARD),
        allreduce_s=steps and steps.seconds(ALLREDUCE),
        waiting_s=both and both.seconds(INPUT),
    )


def _covered(ranges: list[tuple[float, float]]) -> float | None:
    """Share of the time from the first begin to the last end that lies in a range."""
    if not ranges:
        return None
    covered, reached = 0.0, min(begin for begin, _ in ranges)
    first = reached
    for begin, end in sorted(ranges):
        covered += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return covered / (reached - first)


def _write_part(annotation_file: Path, image_ids: Collection[int], target: Path) -> None:
    """A COCO annotation file of some of the images of another."""
    content, wanted = json.loads(annotation_file.read_bytes()), set(image_ids)
    content["images"] = [image for image in content["images"] if image["id"] in wanted]
    content["annotations"] = [item for item in content["annotations"] if item["image_id"] in wanted]
    target.write_text(json.dumps(content))
