"""The profile of a recipe: where the time of training and of evaluation goes, measured on what they run.

The stages take turns (input, step, both, input, …), so that a machine that becomes slower does so for all of them. The
loop, the step and the pipelines are those of training. With several ranks all of them measure at the same time; the
profile has the times of rank 0, and a few of every rank.
"""

import logging
import socket
from collections.abc import Collection, Sequence
from itertools import chain, repeat
from pathlib import Path
from typing import NamedTuple

import torch

from ssd_fast import hardware
from ssd_fast.config.sections import Config
from ssd_fast.data.annotations import NUMBERED_CATEGORIES, Category
from ssd_fast.data.loaders import make_train_loader
from ssd_fast.data.sets import load_sets
from ssd_fast.distributed.launch import connect
from ssd_fast.distributed.world import World
from ssd_fast.evaluation.detector import Detector, load_detector, make_random_detector
from ssd_fast.files import write_atomically
from ssd_fast.model.anchors import model_anchors
from ssd_fast.parts import ALLREDUCE, BACKWARD, FORWARD, INPUT
from ssd_fast.profiling.bottleneck import find_bottlenecks
from ssd_fast.profiling.evaluation_profiler import profile_evaluation
from ssd_fast.profiling.input_profiler import InputProfiler
from ssd_fast.profiling.profile import (
    BOTH,
    EVALUATION,
    INPUT_ALONE,
    PROFILE_FILE,
    REPORT_FILE,
    STEP_ALONE,
    Machine,
    Profile,
    Rank,
    Stage,
)
from ssd_fast.profiling.report import to_html
from ssd_fast.profiling.step_profiler import StepDetails, StepProfiler
from ssd_fast.profiling.stopwatch import Stopwatch

logger = logging.getLogger(__name__)

_ROUNDS = 3


class Measured(NamedTuple):
    """The measurements of a rank.

    profile: complete on rank 0; on other ranks it has no findings.
    trace: a few steps of this rank for Perfetto (gzip); empty where no step was measured.
    """

    profile: Profile
    trace: bytes
    rank: int


def profile_run(
    config: Config,
    data: Path | None,
    *,
    recipe: str,
    stages: Collection[str],
    seconds: float,
    checkpoint: Path | None = None,
) -> Measured:
    """Measure the stages of a recipe, on every rank of a parallel launch that calls this.

    data: folder in COCO's layout. Without it only STEP_ALONE can be measured, for 80 classes.
    recipe: name of the recipe. stages: some of `profile.STAGES`.
    seconds: time for each stage; a few steps are taken even if they need longer.
    checkpoint: detector whose weights are used. Without it they are random and detect next to nothing.
    Raises ValueError and OSError as training does.
    """
    with connect(config.distributed) as world:
        return _profile(config, data, world, recipe, stages, seconds, checkpoint)


def _profile(
    config: Config,
    data: Path | None,
    world: World,
    recipe: str,
    stages: Collection[str],
    seconds: float,
    checkpoint: Path | None,
) -> Measured:
    device, clock = world.device(), Stopwatch(world)
    sets = load_sets(config, data, world) if data else None
    detector = _make_detector(config, checkpoint, sets.train.categories if sets else NUMBERED_CATEGORIES, device)
    if sets and EVALUATION in stages:
        detector.category_ids_in(sets.val)  # fails where the set lacks a class, before anything is measured
    batches = None
    if sets and {INPUT_ALONE, BOTH} & set(stages):
        loader = make_train_loader(config, sets.train, model_anchors(config.model), device, world)
        batches = chain.from_iterable(loader.epoch() for _ in repeat(None))
    profilers: list[InputProfiler | StepProfiler] = []
    step = None
    if {STEP_ALONE, BOTH} & set(stages):
        step = StepProfiler(config, detector, world, clock, batches, stages)
        step.warm_up()
    if INPUT_ALONE in stages:
        assert sets is not None
        assert batches is not None
        profilers = [InputProfiler(config, sets.train, batches, world, clock)]
    profilers += [step] if step else []
    measured = _take_turns(profilers, seconds / _ROUNDS)
    details = step.details() if step else StepDetails()
    if EVALUATION in stages:
        assert sets is not None
        evaluated = profile_evaluation(config, detector, sets.val, world, clock, seconds=seconds)
        measured += [evaluated] if evaluated else []
    logger.info("measuring the rates of this machine")
    clock.settle()
    profile = Profile(
        machine=_measure_machine(world, detector.dtype, details.peak_bytes),
        config=config.model_dump(mode="json", exclude_none=True),
        recipe=recipe,
        batch_size=config.training.batch_size,
        stages=tuple(measured),
        spans=details.spans,
        work=details.work,
        doubled=dict(details.doubled),
        ranks=tuple(world.gather(_summarise_rank(measured))),
        findings=(),
    )
    if world.is_main:
        profile = profile.model_copy(update={"findings": tuple(find_bottlenecks(profile))})
    return Measured(profile, details.trace, world.rank)


def write_files(folder: Path, measured: Measured, before: Profile | None = None) -> None:
    """Write the trace of a rank to a folder; for rank 0 also profile.json and report.html.

    before: an earlier profile, for report.html to compare with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if measured.rank == 0:
        write_atomically(folder / PROFILE_FILE, measured.profile.model_dump_json(indent=1).encode())
        write_atomically(folder / REPORT_FILE, to_html(measured.profile, before).encode())
    if measured.trace:
        write_atomically(folder / f"trace_rank{measured.rank}.json.gz", measured.trace)


def _make_detector(
    config: Config, checkpoint: Path | None, categories: tuple[Category, ...], device: torch.device
) -> Detector:
    if checkpoint is None:
        return make_random_detector(config, categories, device)
    detector, _ = load_detector(checkpoint, device, config=config, categories=categories)
    return detector


def _take_turns(profilers: Sequence[InputProfiler | StepProfiler], turn_s: float) -> list[Stage]:
    """Stages of all profilers, each measured for _ROUNDS turns."""
    for profiler in profilers:
        profiler.plan(turn_s)
    for turn in range(_ROUNDS if profilers else 0):
        planned = [f"{number} x {name}" for profiler in profilers for name, number in profiler.planned.items()]
        logger.info("round %d of %d: %s", turn + 1, _ROUNDS, ", ".join(planned))
        for profiler in profilers:
            profiler.take_turn()
    return [stage for profiler in profilers for stage in profiler.stages()]


def _measure_machine(world: World, dtype: torch.dtype, peak_bytes: int | None) -> Machine:
    device = world.device()
    return Machine(
        device=hardware.device_name(device, world.cores),
        is_gpu=device.type == "cuda",
        ranks=world.size,
        cores=world.cores,
        torch=torch.__version__,
        dtype=str(dtype).removeprefix("torch."),
        matrix_flop_per_s=hardware.matrix_rate(device, dtype),
        bf16_flop_per_s=hardware.matrix_rate(device, torch.bfloat16),
        copy_bytes_per_s=hardware.copy_rate(device),
        peak_bytes=peak_bytes,
    )


def _summarise_rank(stages: Sequence[Stage]) -> Rank:
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
