"""The data of a profile: a tree of plain values that is saved as JSON."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

INPUT_ALONE, STEP_ALONE, BOTH, EVALUATION = "input alone", "step alone", "both together", "evaluation"
STAGES = (INPUT_ALONE, STEP_ALONE, BOTH, EVALUATION)
STAGES_OF_OPTION = {
    "all": STAGES,
    "input": (INPUT_ALONE,),
    "step": (STEP_ALONE,),
    "both": (STEP_ALONE, BOTH),
    "evaluation": (EVALUATION,),
}
REST = "the rest"
PROFILE_FILE, REPORT_FILE = "profile.json", "report.html"
RESULT_FILES = (PROFILE_FILE, REPORT_FILE, "trace_rank*.json.gz")


class ProfileError(ValueError):
    """A file that is not a profile. The message names it."""


def add_parts(samples: Mapping[str, Sequence[float]]) -> list[float]:
    """Seconds of each batch or step: the sums of its parts."""
    return [sum(parts) for parts in zip(*samples.values(), strict=True)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Part(_Record):
    """Seconds of a part in each batch or step: median and quartiles."""

    name: str
    median_s: float
    low_s: float
    high_s: float

    @classmethod
    def of(cls, name: str, seconds: list[float]) -> Self:
        """Summary of all seconds that were measured."""
        low, _, high = quantiles(seconds * (2 if len(seconds) == 1 else 1), n=4, method="inclusive")
        return cls(name=name, median_s=median(seconds), low_s=low, high_s=high)


class Stage(_Record):
    """An activity that was measured many times: its batches or steps.

    whole: a batch or step. parts: its parts, in their order; they add up to the whole in each batch or step.
    images: images of all ranks in a batch or step (the mean, where the last batch is smaller).
    busy: share of the time that the cores of rank 0 worked.
    samples: seconds of each part in each batch or step of rank 0; for the input, means over a lap of batches.
    """

    name: str
    whole: Part
    parts: tuple[Part, ...]
    images: float
    busy: float
    samples: dict[str, list[float]]

    @classmethod
    def of(cls, name: str, samples: dict[str, list[float]], *, images: float, busy: float) -> Self:
        """Summary of samples."""
        whole = Part.of(name, add_parts(samples))
        parts = tuple(Part.of(part, seconds) for part, seconds in samples.items())
        return cls(name=name, whole=whole, parts=parts, images=images, busy=busy, samples=samples)

    @property
    def images_per_s(self) -> float:
        return self.images / self.whole.median_s

    def seconds(self, part: str) -> float:
        """Median of a part; 0 if there is none of that name."""
        return next((item.median_s for item in self.parts if item.name == part), 0.0)


class Span(_Record):
    """A part of a step on rank 0, in seconds since the first step began."""

    part: str
    begin_s: float
    end_s: float


class HostRead(_Record):
    """A line of code that makes the host wait for a value of the device. times: in a step."""

    place: str
    times: int


class Operator(_Record):
    """seconds: in a step, on the device, without the operators that it calls."""

    name: str
    seconds: float


class Work(_Record):
    """The work of a step of one rank.

    forward_flop, train_flop: operations for an image; a multiply-add is 2.
    bytes: traffic of the step's operators, each tensor once per call. parameter_bytes: size of the weights.
    operators: those that take longest; on a GPU, kernels.
    gpu_busy: share of the time that the GPU computed. layout_kernels: calls in a step that only turn NCHW into NHWC or
    back. Both are None on a CPU.
    """

    forward_flop: float
    train_flop: float
    bytes: float
    parameter_bytes: int
    host_reads: tuple[HostRead, ...]
    operators: tuple[Operator, ...] = ()
    gpu_busy: float | None = None
    layout_kernels: float | None = None


class Machine(_Record):
    """The machine of rank 0. Its rates are measured.

    matrix_flop_per_s, bf16_flop_per_s: rate of large products in `dtype` and in bfloat16 (hardware.matrix_rate).
    copy_bytes_per_s: rate of a large copy, bytes read and bytes written together.
    peak_bytes: most memory in training; None where it is unknown.
    """

    device: str
    is_gpu: bool
    ranks: int
    cores: int
    torch: str
    dtype: str
    matrix_flop_per_s: float
    bf16_flop_per_s: float
    copy_bytes_per_s: float
    peak_bytes: int | None


class Rank(_Record):
    """Medians of one rank, seconds of a batch or step; None where the stage was not measured."""

    host: str
    input_s: float | None
    step_s: float | None
    compute_s: float | None
    allreduce_s: float | None
    waiting_s: float | None


class Finding(_Record):
    """A cause of lost time. lost: estimated share of the time. sentence: the cause, and what to change."""

    name: str
    lost: float
    sentence: str


class Profile(_Record):
    """A complete profile.

    config: the recipe, by section and key. batch_size: images of a rank.
    doubled: median seconds of the parts of a step alone with twice the images; empty where that was not measured.
    findings: the first says what bounds the run.
    """

    machine: Machine
    config: dict[str, dict[str, Any]]
    recipe: str
    batch_size: int
    stages: tuple[Stage, ...]
    spans: tuple[Span, ...]
    work: Work | None
    doubled: dict[str, float]
    ranks: tuple[Rank, ...]
    findings: tuple[Finding, ...]

    def stage(self, name: str) -> Stage | None:
        """The stage of a name; None if it was not measured."""
        return next((stage for stage in self.stages if stage.name == name), None)

    def measured(self, *names: str) -> list[Stage]:
        """Stages of these names, as far as they were measured."""
        return [stage for name in names if (stage := self.stage(name)) is not None]

    def flop_per_s(self, stage: Stage) -> float:
        """Arithmetic rate that one rank reaches in a stage of training."""
        assert self.work is not None
        return self.work.train_flop * stage.images / self.machine.ranks / stage.whole.median_s

    def bytes_per_s(self, stage: Stage) -> float:
        """Memory traffic of one rank in a stage of training."""
        assert self.work is not None
        return self.work.bytes / stage.whole.median_s


def read_profile(path: Path) -> Profile:
    """The profile in a file, or in a folder that `ssd-fast profile` wrote. Raises ProfileError or OSError."""
    if path.is_dir():
        path /= PROFILE_FILE
    try:
        return Profile.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ProfileError(f"{path}: expected a profile of `ssd-fast profile`: {key}: {first['msg']}") from None


def is_result(folder: Path) -> bool:
    """Whether a folder holds a profile."""
    try:
        read_profile(folder)
    except (OSError, ValueError):
        return False
    return True
