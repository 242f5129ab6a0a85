"""The profile of training: what it measures is what runs, and a planted bottleneck is found."""

import gzip
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from repository import REPOSITORY
from tiny import TINY, tiny_config
from typer.testing import CliRunner

from dali_pipelines import loader, train
from dali_pipelines.augment import PIXEL_PARTS
from ssd_fast import hardware
from ssd_fast.__main__ import app
from ssd_fast.config.recipe import load_config
from ssd_fast.data.annotations import NUMBERED_CATEGORIES
from ssd_fast.data.policy import DataError
from ssd_fast.distributed.world import World
from ssd_fast.evaluation.detector import make_random_detector
from ssd_fast.model.loss import Loss
from ssd_fast.parts import OPTIMIZER, STEP_PARTS
from ssd_fast.profiling import evaluation_profiler, input_profiler, profiler, step_profiler
from ssd_fast.profiling.profile import BOTH, EVALUATION, INPUT_ALONE, STAGES, STEP_ALONE, Profile, read_profile
from ssd_fast.profiling.profiler import profile_run
from ssd_fast.profiling.step_profiler import StepProfiler, _covered
from ssd_fast.profiling.stopwatch import Stopwatch
from ssd_fast.training import loop, step
from ssd_fast.training.step import TrainStep


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure little: one round, nothing with twice the images, and rates of the machine that are made up.

    On a busy machine a step with twice the images may differ by more than what a test plants. A product in bfloat16
    takes minutes on a CPU without instructions for it.
    """
    monkeypatch.setattr(profiler, "_ROUNDS", 1)
    monkeypatch.setattr(input_profiler, "_REPEATS", 1)
    monkeypatch.setattr(step_profiler, "_LONGEST_DOUBLED_S", 0.0)
    monkeypatch.setattr(hardware, "matrix_rate", lambda device, dtype: 100e9)
    monkeypatch.setattr(hardware, "copy_rate", lambda device: 10e9)


def measure(data: Path | None, stages: Sequence[str], overrides: Sequence[str] = (), seconds: float = 0.3) -> Profile:
    config = tiny_config(overrides)
    return profile_run(config, data, recipe="tiny.toml", stages=stages, seconds=seconds).profile


def test_the_command_leaves_a_report_that_can_be_compared(synthetic_set: Path, tmp_path: Path) -> None:
    sets = [argument for key in TINY for argument in ("--set", key)]
    arguments = ["profile", "--config", str(REPOSITORY / "configs" / "demo.toml"), *sets, "--seconds", "0.3"]
    first = tmp_path / "first"
    result = CliRunner().invoke(app, [*arguments, "--data", str(synthetic_set), "--output", str(first)])
    assert result.exit_code == 0, result.output
    assert "Bound by " in result.stdout
    report = read_profile(first)
    assert [stage.name for stage in report.stages] == list(STAGES)
    for stage in report.stages:
        wholes = [sum(step) for step in zip(*stage.samples.values(), strict=True)]
        assert stage.whole.median_s == pytest.approx(median(wholes))
        assert [part.name for part in stage.parts] == list(stage.samples)
    page = (first / "report.html").read_text()
    assert all(stage.name in page for stage in report.stages)
    events = json.loads(gzip.decompress((first / "trace_rank0.json.gz").read_bytes()))["traceEvents"]
    assert set(STEP_PARTS) <= {event.get("name") for event in events}

    second = tmp_path / "second"
    arguments += ["--stage", "step", "--set", "training.batch_size=4", "--output", str(second)]
    result = CliRunner().invoke(app, [*arguments, "--compare", str(first)])
    assert result.exit_code == 0, result.output
    assert "training.batch_size" in result.stdout
    result = CliRunner().invoke(app, ["profile", "--compare", str(first), "--compare", str(second)])
    assert result.exit_code == 0, result.output
    assert "training.batch_size" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "expected --config"),
        (["--config", "demo"], "--stage all: expected --data"),
        (["--config", "demo", "--stage", "step", "--compare", "demo", "--compare", "demo"], "expected one earlier"),
        (["--config", "demo", "--stage", "step", "--compare", "nowhere"], "nowhere"),
        (["--compare", "demo", "--compare", "demo"], r"demo\.toml: expected a profile"),
        (["--config", "demo", "--stage", "step", "--output", __file__], "is a file: expected a folder"),
        (["--config", "demo", "--data", "nowhere"], "nowhere"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments: list[str], expected: str) -> None:
    demo = str(REPOSITORY / "configs" / "demo.toml")
    result = CliRunner().invoke(app, ["profile", *(demo if word == "demo" else word for word in arguments)])
    assert result.exit_code
    with pytest.raises((ValueError, OSError), match=expected):
        raise result.exception  # type: ignore[misc]


def test_a_refused_profile_leaves_no_folder(tmp_path: Path) -> None:
    folder = tmp_path / "profile"
    for verb in ("profile", "operators"):
        result = CliRunner().invoke(app, [verb, "--config", "nowhere.toml", "--data", ".", "--output", str(folder)])
        assert result.exit_code
    assert not folder.exists()


def test_operations_are_those_of_the_recipe() -> None:
    config = load_config(REPOSITORY / "configs" / "ssd300.toml", ["training.batch_size=1"])
    detector = make_random_detector(config, NUMBERED_CATEGORIES, torch.device("cpu"))
    world = World()
    work = StepProfiler(config, detector, world, Stopwatch(world), None, [STEP_ALONE]).count_work()
    assert work.forward_flop == pytest.approx(31.72e9, rel=1e-3)
    assert work.train_flop == pytest.approx(94.75e9, rel=1e-3)
    assert work.parameter_bytes == pytest.approx(4 * 19.97e6, rel=1e-3)
    assert not work.host_reads


def test_what_is_timed_is_training_itself(synthetic_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, original = [], TrainStep.__call__

    def train_step(self: TrainStep, batch: Any, learning_rate: float) -> Loss:
        steps.append(batch.images.shape)
        return original(self, batch, learning_rate)

    monkeypatch.setattr(TrainStep, "__call__", train_step)
    report = measure(synthetic_set, [BOTH])
    both = report.stage(BOTH)
    assert both is not None
    assert len(steps) > len(both.samples[OPTIMIZER]) >= 2
    assert set(steps) == {torch.Size([8, 3, 64, 64])}


def test_the_parts_of_the_input_are_those_of_pipelines_that_end_early(synthetic_set: Path) -> None:
    report = measure(synthetic_set, [INPUT_ALONE])
    fed = report.stage(INPUT_ALONE)
    assert fed is not None
    assert [part.name for part in fed.parts] == [*PIXEL_PARTS, "encode, hand over"]
    wholes = [sum(parts) for parts in zip(*fed.samples.values(), strict=True)]
    assert fed.samples["read"] != wholes
    assert min(wholes) > 0
    assert report.findings[0].sentence.startswith("Bound by the input")


def test_evaluation_scores_the_images_that_it_measures(synthetic_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scored = []

    def score(annotations: Path, *_: Any, **__: Any) -> None:
        content = json.loads(annotations.read_text())
        scored.append((len(content["images"]), {item["image_id"] for item in content["annotations"]}))

    monkeypatch.setattr(evaluation_profiler.coco_eval, "score", score)
    report = measure(synthetic_set, [EVALUATION], ["evaluation.batch_size=4"], seconds=1e-9)
    stage = report.stage(EVALUATION)
    assert stage is not None
    assert stage.images == 4
    ((num_images, annotated),) = scored
    assert num_images == 4
    assert len(annotated) <= 4


# ---- planted bottlenecks ----


class VirtualClock:
    """A clock that a busy machine does not change: each reading takes a millisecond, more is planted."""

    def __init__(self) -> None:
        self._now = 0.0

    def __call__(self) -> float:
        self.advance(0.001)
        return self._now

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self._now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> VirtualClock:
    found = VirtualClock()
    monkeypatch.setattr(time, "perf_counter", found)
    return found


def test_time_lost_in_the_optimizer_is_found(monkeypatch: pytest.MonkeyPatch, clock: VirtualClock) -> None:
    original = torch.optim.SGD.step

    def slow_step(self: torch.optim.SGD, *arguments: Any, **named: Any) -> Any:
        clock.advance(0.3)
        return original(self, *arguments, **named)

    monkeypatch.setattr(torch.optim.SGD, "step", slow_step)
    report = measure(None, [STEP_ALONE])
    assert report.findings[0].sentence.startswith("Bound by the optimizer: it takes ")


def test_a_value_read_in_the_loop_is_found_with_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    original = step.LossMeter.add

    def reading_add(self: step.LossMeter, loss: Loss, number: int) -> None:
        loss.total.item()
        original(self, loss, number)

    monkeypatch.setattr(step.LossMeter, "add", reading_add)
    report = measure(None, [STEP_ALONE])
    assert any("1 a step at tests/profiling/test_profiler.py:" in finding.sentence for finding in report.findings)


def test_a_slow_disk_is_found(synthetic_set: Path, monkeypatch: pytest.MonkeyPatch, clock: VirtualClock) -> None:
    original = loader.run_ragged

    def slow_run(*arguments: Any) -> tuple[Any, ...]:
        clock.advance(0.2)
        return original(*arguments)

    monkeypatch.setattr(loader, "run_ragged", slow_run)
    monkeypatch.setattr(train, "run_ragged", slow_run)
    report = measure(synthetic_set, [INPUT_ALONE], ["data.prefetch_batches=1"])
    assert re.match(r"Bound by the input: read takes \d+% of its time: the disk", report.findings[0].sentence)


def test_time_between_the_parts_is_found(monkeypatch: pytest.MonkeyPatch, clock: VirtualClock) -> None:
    original = loop.Loop.learning_rate

    def slow_learning_rate(self: loop.Loop, number: int) -> float:
        clock.advance(0.3)
        return original(self, number)

    monkeypatch.setattr(loop.Loop, "learning_rate", slow_learning_rate)
    assert measure(None, [STEP_ALONE]).findings[0].sentence.startswith("Bound by the host: ")


@pytest.mark.parametrize(
    ("ranges", "expected"), [([], None), ([(2.0, 3.0)], 1.0), ([(3.0, 4.0), (0.0, 1.0), (0.5, 2.0), (0.6, 0.7)], 0.75)]
)
def test_busy_is_the_share_that_some_kernel_covers(ranges: list[tuple[float, float]], expected: float | None) -> None:
    assert _covered(ranges) == expected


def test_a_detector_of_other_classes_than_the_set_is_refused_before_anything_is_measured(
    synthetic_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = make_random_detector(tiny_config(), NUMBERED_CATEGORIES, torch.device("cpu"))
    monkeypatch.setattr(profiler, "_make_detector", lambda *_: detector)
    monkeypatch.setattr(profiler, "_take_turns", None)  # not called
    with pytest.raises(DataError, match=r"instances_val2017\.json: lacks the categories \['class 1'"):
        measure(synthetic_set, [INPUT_ALONE, EVALUATION])
