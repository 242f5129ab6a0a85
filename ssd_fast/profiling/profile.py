"""What a profile knows: a tree of plain values, written as JSON and read again to be compared."""

from pathlib import Path
from statistics import median, quantiles
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

INPUT_ALONE, STEP_ALONE, BOTH, EVALUATION = "input alone", "step alone", "both together", "evaluation"
STAGES = (INPUT_ALONE, STEP_ALONE, BOTH, EVALUATION)
REST = "the rest"


class ProfileError(ValueError):
    """A file that is no profile; the message names it."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Part(_Record):
    """Of a batch or step, seconds: the median over all that were measured, and the quartiles."""

    name: str
    median_s: float
    low_s: float
    high_s: float

    @classmethod
    def of(cls, name: str, seconds: list[float]) -> Self:
        low, _, high = quantiles(seconds * (2 if len(seconds) == 1 else 1), n=4, method="inclusive")
        return cls(name=name, median_s=median(seconds), low_s=low, high_s=high)


class Stage(_Record):
    """Something that was done again and again.

    whole: of a batch or step. parts: of it, in their order; in every step they add up to the whole.
    images: of all ranks in a batch or step (in the mean, where the last batch is smaller).
    busy: share of the time that those cores worked that rank 0 may use.
    samples: seconds of each part, in every batch or step of rank 0; of the input, means of each round.
    """

    name: str
    whole: Part
    parts: tuple[Part, ...]
    images: float
    busy: float
    samples: dict[str, list[float]]

    @property
    def images_per_s(self) -> float:
        return self.images / self.whole.median_s

    def seconds(self, part: str) -> float:
        """Median of a part; 0 if there is none of the name."""
        return next((item.median_s for item in self.parts if item.name == part), 0.0)


class Span(_Record):
    """A part of a step of `both together` on rank 0, seconds from the first one's begin."""

    part: str
    begin_s: float
    end_s: float


class HostRead(_Record):
    """A place in the code that makes the host wait for a value of the device, and how often in a step."""

    place: str
    times: int


class Operator(_Record):
    """seconds: of a step, on the device, without the operators that it calls."""

    name: str
    seconds: float


class Work(_Record):
    """What a step of one rank has to do, counted in one.

    forward_flop, train_flop: of an image; 2 for a multiply-add. bytes: that the step's operators read and wrote, each
    tensor once per call. parameter_bytes: of the weights.
    operators: that took the longest, on a GPU kernels.
    gpu_busy: share of the time that a GPU computed. layout_kernels: calls in a step that only turn NCHW into NHWC or
    back, on a GPU.
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
    """Where it was measured.

    Rates are measured, too: matrix_… of large products in `dtype`, bf16_… in bfloat16 (hardware.matrix_rate), copy_…
    of a large copy, bytes that are read and those that are written together. peak_bytes: of memory, in training.
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
    """Medians of one rank, seconds of a step; None where the stage was not measured."""

    host: str
    input_s: float | None
    step_s: float | None
    compute_s: float | None
    allreduce_s: float | None
    waiting_s: float | None


class Finding(_Record):
    """lost: share of the time that is lost to it, an estimate; sentence: what, and what to change."""

    name: str
    lost: float
    sentence: str


class Profile(_Record):
    """All of it.

    config: the recipe, by section and key. batch_size: of a rank. doubled: of a step alone with twice the images,
    median seconds of its parts; empty where that was not measured. findings: the first says what bounds the run.
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
        """The stage of a name, if it was measured."""
        return next((stage for stage in self.stages if stage.name == name), None)


def read_profile(path: Path) -> Profile:
    """A profile that was written before. Raises ProfileError, which names the file, or OSError."""
    if path.is_dir():
        path /= "profile.json"
    try:
        return Profile.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ProfileError(f"{path}: expected a profile of `ssd-fast profile`: {where} {first['msg']}") from None
