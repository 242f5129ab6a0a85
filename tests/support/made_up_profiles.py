"""Profiles that are made up: a step of 100 ms, its input of 40 ms, an evaluation of 50 ms for each batch."""

import random
from collections.abc import Mapping
from typing import Any

from ssd_fast.profiling.profile import (
    BOTH,
    EVALUATION,
    INPUT_ALONE,
    STAGES,
    STEP_ALONE,
    Finding,
    HostRead,
    Machine,
    Operator,
    Profile,
    Rank,
    Span,
    Stage,
    Work,
)

INPUT_MS = {
    "read": 1.0,
    "crop and decode": 20.0,
    "resize": 9.0,
    "colour, normalise, flip": 6.0,
    "encode, hand over": 4.0,
}
STEP_MS = {
    "waiting for input": 0.5,
    "forward": 30.0,
    "loss": 2.0,
    "backward": 60.0,
    "allreduce": 3.0,
    "optimizer": 4.0,
    "the rest": 0.5,
}
EVALUATION_MS = {"pre-processing": 5.0, "model": 30.0, "decoding and NMS": 3.0, "collect": 1.0, "score": 11.0}
CPU = Machine(
    device="AMD EPYC 9B14, 2 cores",
    is_gpu=False,
    ranks=1,
    cores=2,
    torch="2.11.0",
    dtype="float32",
    matrix_flop_per_s=15.16e12,
    bf16_flop_per_s=30e12,
    copy_bytes_per_s=80e9,
    peak_bytes=6_250_000_000,
)
GPU = Machine(
    device="NVIDIA H200",
    is_gpu=True,
    ranks=1,
    cores=16,
    torch="2.11.0",
    dtype="bfloat16",
    matrix_flop_per_s=740e12,
    bf16_flop_per_s=740e12,
    copy_bytes_per_s=3.9e12,
    peak_bytes=6_250_000_000,
)
WORK = Work(
    forward_flop=31.72e9,
    train_flop=94.75e9,
    bytes=4e9,
    parameter_bytes=80_000_000,
    host_reads=(HostRead(place="ssd_fast/training/step.py:61 train_step", times=2),),
    operators=tuple(Operator(name=f"aten::operator_{n}", seconds=0.04 / (n + 1)) for n in range(12)),
)
RANK = {"input_s": 0.04, "step_s": 0.1, "compute_s": 0.09, "allreduce_s": 0.003, "waiting_s": 0.0015}
FINDINGS = (
    Finding(name="arithmetic", lost=0.0, sentence="Bound by the arithmetic: it takes 90% of a step."),
    Finding(name="batch", lost=0.2, sentence="Also: the batch of 8 is small. Set training.batch_size = 16."),
)
FORMS: dict[str, dict[str, Any]] = {
    "CPU": {},
    "GPU": {"gpus": 1},
    "ranks": {"gpus": 4, "ranks": 4},
    "step alone": {"stages": (STEP_ALONE,)},
    "input alone": {"stages": (INPUT_ALONE,), "work": None},
    "evaluation": {"stages": (EVALUATION,), "work": None, "findings": ()},
    "nothing": {"stages": (), "work": None, "findings": ()},
}
"""Arguments of make_profile, for every kind of profile."""


def make_stage(name: str, parts_ms: Mapping[str, float], images: float, *, steps: int = 3, spread: float = 0) -> Stage:
    """A stage of given medians. spread: share by which the samples differ from them."""
    generator = random.Random(name)
    samples = {}
    for part, value in parts_ms.items():
        factors = [1 + spread * generator.uniform(-1, 1) for _ in range(steps)]
        middle = sorted(factors)[steps // 2]
        samples[part] = [value / 1e3 * factor / middle for factor in factors]
    return Stage.of(name, samples, images=images, busy=0.87)


def make_spans(both: Stage, steps: int = 3) -> tuple[Span, ...]:
    """The parts of the first steps, one after another."""
    spans, now = [], 0.0
    for n in range(steps):
        for part, seconds in both.samples.items():
            if part != "the rest":
                spans.append(Span(part=part, begin_s=now, end_s=now + seconds[n]))
            now += seconds[n]
    return tuple(spans)


def make_profile(
    *,
    gpus: int = 0,
    ranks: int = 1,
    batch_size: int = 8,
    input_ms: Mapping[str, float] = INPUT_MS,
    step_ms: Mapping[str, float] = STEP_MS,
    waiting_ms: float = 1.5,
    steps: int = 3,
    spread: float = 0,
    stages: tuple[str, ...] = STAGES,
    **changes: Any,
) -> Profile:
    """A profile whose steps take 100 ms, and 101 ms together with their input. changes: fields of it."""
    images = batch_size * ranks
    made = (
        make_stage(INPUT_ALONE, input_ms, images, spread=spread),
        make_stage(STEP_ALONE, step_ms, images, steps=steps, spread=spread),
        make_stage(BOTH, {**step_ms, "waiting for input": waiting_ms}, images, steps=steps, spread=spread),
        make_stage(EVALUATION, EVALUATION_MS, images),
    )
    fields = {
        "machine": (GPU if gpus else CPU).model_copy(update={"ranks": ranks}),
        "config": {"training": {"batch_size": batch_size, "precision": "auto"}, "data": {"num_threads": 0}},
        "recipe": "configs/ssd300.toml",
        "batch_size": batch_size,
        "stages": tuple(stage for stage in made if stage.name in stages),
        "spans": make_spans(made[2]) if BOTH in stages else (),
        "work": WORK.model_copy(update={"gpu_busy": 0.96, "layout_kernels": 0.0}) if gpus else WORK,
        "doubled": {"forward": 0.05, "backward": 0.11} if STEP_ALONE in stages else {},
        "ranks": tuple(Rank(host=f"node{n // 4}", **RANK) for n in range(ranks)),
        "findings": FINDINGS,
    }
    return Profile(**{**fields, **changes})
