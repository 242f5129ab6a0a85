"""A whole run: what it leaves, how it goes on after a break, how it ends when it must."""

import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image
from repository import REPOSITORY
from tiny import TINY, assert_same_end, final_state, tiny_config

from dali_pipelines.batch import TrainBatch
from ssd_fast.checkpoints.checkpoint import (
    BEST,
    CheckpointError,
    load_checkpoint,
    newest_checkpoint,
    numbered_path,
    save_checkpoint,
)
from ssd_fast.files import unfinished
from ssd_fast.model.loss import Loss
from ssd_fast.training.history import read_metrics
from ssd_fast.training.run import train
from ssd_fast.training.step import TrainStep

STEPS = 16  # two epochs of eight
EVERY_STEP = "training.checkpoint_every_steps=1"


@contextmanager
def during_step(monkeypatch: pytest.MonkeyPatch, number: int, action: Callable[[], None]) -> Iterator[None]:
    """Does something within the training step of that number, counted from 1 in this process."""
    original, count = TrainStep.__call__, 0

    def train_step(self: TrainStep, batch: TrainBatch, learning_rate: float) -> Loss:
        nonlocal count
        count += 1
        if count == number:
            action()
        return original(self, batch, learning_rate)

    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "__call__", train_step)
        yield


def test_a_run_leaves_its_records_and_images(finished: Path) -> None:
    left = {path.name for path in finished.iterdir()}
    assert left >= {"config.toml", "train.log", "metrics.jsonl", "tensorboard", "mlperf.log", "checkpoints"}
    assert {path.name for path in (finished / "checkpoints").iterdir()} == {BEST, f"step_{STEPS:09d}.pt"}
    assert not list(finished.rglob(".*"))
    for name in ("curves.png", "detections.png", "precision_recall.png"):
        with Image.open(finished / name) as image:
            assert min(image.size) >= 300
    records = read_metrics(finished / "metrics.jsonl")
    assert [(record["step"], record["epoch"]) for record in records if record["kind"] == "eval"] == [(8, 1), (16, 2)]
    train_records = [record for record in records if record["kind"] == "train"]
    assert [record["step"] for record in train_records] == [3, 6, 8, 11, 14, 16]
    assert all(math.isfinite(record["loss"]) for record in train_records)
    assert json.loads((finished / "detections.json").read_text())
    assert "epoch 2/2 step 8/8" in (finished / "train.log").read_text()


def test_the_mlperf_log_of_a_run_is_accepted_by_mlperfs_own_checker(finished: Path, tmp_path: Path) -> None:
    options = ["--usage", "training", "--ruleset", "1.0.0", "--log_output", str(tmp_path / "checker.log")]
    command = [sys.executable, "-m", "mlperf_logging.compliance_checker", *options]
    assert subprocess.run([*command, str(finished / "mlperf.log")], capture_output=True, check=False).returncode == 0
    lines = (finished / "mlperf.log").read_text().splitlines(keepends=True)
    cut = tmp_path / "cut.log"
    cut.write_text("".join(line for line in lines if "eval_accuracy" not in line))
    assert subprocess.run([*command, str(cut)], capture_output=True, check=False).returncode != 0


def test_training_lowers_the_loss(synthetic_set: Path, tmp_path: Path) -> None:
    changes = ("training.epochs=8", "optimizer.decay_epochs=[]", "evaluation.epochs=[]", "optimizer.learning_rate=0.02")
    train(tiny_config(changes), synthetic_set, tmp_path / "run", resume=False)
    losses = [
        record["loss"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if record["kind"] == "train"
    ]
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])


@pytest.mark.parametrize(
    ("number", "step"),
    [(signal.SIGINT, 3), (signal.SIGTERM, 8), (signal.SIGINT, 11)],
    ids=["mid-epoch", "last step of an epoch", "second epoch"],
)
def test_a_run_stopped_by_a_signal_and_resumed_ends_as_if_uninterrupted(
    finished: Path,
    synthetic_set: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    step: int,
) -> None:
    output = tmp_path / "run"
    with during_step(monkeypatch, step, lambda: os.kill(os.getpid(), number)):
        outcome = train(tiny_config(), synthetic_set, output, resume=False)
    assert outcome.stopped_by == number
    stopped = newest_checkpoint(output / "checkpoints")
    assert stopped is not None
    assert stopped.step == step
    assert train(tiny_config(), synthetic_set, output, resume=True).stopped_by == 0
    assert_same_end(output, finished, STEPS)
    scores = [record for record in read_metrics(output / "metrics.jsonl") if record["kind"] == "eval"]
    assert scores == [record for record in read_metrics(finished / "metrics.jsonl") if record["kind"] == "eval"]
    steps = [record["step"] for record in read_metrics(output / "metrics.jsonl") if record["kind"] == "train"]
    assert steps == sorted(set(steps))


def train_command(config_overrides: tuple[str, ...], data: Path, output: Path, *options: str) -> list[str]:
    """The command line of a tiny run."""
    sets = [part for change in (*TINY, *config_overrides) for part in ("--set", change)]
    recipe = str(REPOSITORY / "configs" / "demo.toml")
    places = ["--config", recipe, "--data", str(data), "--output", str(output)]
    return [sys.executable, "-m", "ssd_fast", "train", *places, *sets, *options]


def test_a_killed_run_goes_on_exactly_from_its_newest_good_checkpoint(
    finished: Path, synthetic_set: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    process = subprocess.Popen(train_command((EVERY_STEP, "training.keep_checkpoints=3"), synthetic_set, output))
    try:
        deadline = time.monotonic() + 120
        while not numbered_path(output / "checkpoints", 5).exists():
            assert process.poll() is None, "the run ended before its fifth step"
            assert time.monotonic() < deadline, "no checkpoint of step 5 within two minutes"
            time.sleep(0.005)
    finally:
        process.kill()
        process.wait()
    saved = sorted((output / "checkpoints").glob("step_*.pt"))
    newest = saved[-1]
    newest.write_bytes(newest.read_bytes()[:-1000])
    for place in (output, output / "checkpoints"):
        unfinished(place / "step_000000007.pt").write_bytes(b"of a process that was killed while it wrote")
        (place / ".of the user").touch()
    before = newest_checkpoint(output / "checkpoints")
    assert before is not None
    assert f"step_{before.step:09d}.pt" == saved[-2].name
    assert train(tiny_config(), synthetic_set, output, resume=True).stopped_by == 0
    assert_same_end(output, finished, STEPS)
    assert {path.name for path in output.rglob(".*")} == {".of the user"}


def test_a_run_in_bfloat16_resumes_exactly(
    synthetic_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(("training.precision=bf16", "training.epochs=1", "evaluation.epochs=[]"))
    train(config, synthetic_set, tmp_path / "whole", resume=False)
    with during_step(monkeypatch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        train(config, synthetic_set, tmp_path / "parts", resume=False)
    assert train(config, synthetic_set, tmp_path / "parts", resume=True).stopped_by == 0
    assert_same_end(tmp_path / "parts", tmp_path / "whole", 8)


def test_resume_without_a_run_begins_one(synthetic_set: Path, tmp_path: Path, finished: Path) -> None:
    train(tiny_config(), synthetic_set, tmp_path / "run", resume=True)
    assert_same_end(tmp_path / "run", finished, STEPS)


def test_a_finished_run_is_left_alone(finished: Path, synthetic_set: Path) -> None:
    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.name != "lock"}

    before = times()
    outcome = train(tiny_config(), synthetic_set, finished, resume=True)
    assert outcome.best_map >= 0
    assert times() == before


def test_a_run_that_has_gone_beyond_a_shorter_recipe_is_finished(
    synthetic_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    with during_step(monkeypatch, 11, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        train(tiny_config(("evaluation.epochs=[]",)), synthetic_set, output, resume=False)
    assert train(tiny_config(("training.epochs=1",)), synthetic_set, output, resume=True).stopped_by == 0
    newest = newest_checkpoint(output / "checkpoints")
    assert newest is not None
    assert newest.step == 11


def test_reaching_the_target_ends_the_run_and_the_mlperf_log_says_so(synthetic_set: Path, tmp_path: Path) -> None:
    outcome = train(tiny_config(("evaluation.target_map=0.0",)), synthetic_set, tmp_path / "run", resume=False)
    assert outcome.reached_target
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / BEST).step == 8
    assert '"status": "success"' in (tmp_path / "run" / "mlperf.log").read_text()


def test_evaluations_without_a_better_map_end_the_run(synthetic_set: Path, tmp_path: Path) -> None:
    patient = ("evaluation.epochs=[1,2,3,4]", "evaluation.patience=2", "detection.score_threshold=1")  # detects nothing
    config = tiny_config((*patient, "training.epochs=9"))
    outcome = train(config, synthetic_set, tmp_path / "run", resume=False)
    assert (outcome.stopped_by, outcome.reached_target) == (0, False)
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [record["epoch"] for record in records if record["kind"] == "eval"] == [1, 2, 3]
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / BEST).step == 8
    assert train(config, synthetic_set, tmp_path / "run", resume=True) == outcome  # it is finished


def test_a_warm_up_as_long_as_the_run_is_warned_of(
    synthetic_set: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(tiny_config(("training.epochs=1", "optimizer.warmup_steps=8")), synthetic_set, tmp_path / "run", resume=False)
    assert "optimizer.warmup_steps = 8: expected fewer than the run's 8 steps" in caplog.text


def test_a_scoring_process_that_dies_ends_the_run(
    synthetic_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_python() -> None:
        monkeypatch.setattr(sys, "executable", "/bin/false")

    with (
        during_step(monkeypatch, 1, no_python),
        pytest.raises(ChildProcessError, match="the process that scored an evaluation ended with status 1"),
    ):
        train(tiny_config(), synthetic_set, tmp_path / "run", resume=False)
    newest = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert newest is not None
    assert newest.step == 8  # from where --resume evaluates again
    assert not (tmp_path / "run" / "scores.json").exists()


def test_losses_that_stay_not_finite_end_the_run_with_step_and_learning_rate(
    synthetic_set: Path, tmp_path: Path
) -> None:
    changes = ("optimizer.learning_rate=1e30", "optimizer.warmup_steps=0", "training.max_nonfinite_steps=2")
    with pytest.raises(FloatingPointError, match=r"not finite in \d of the last \d steps, last at step \d+ \(learning"):
        train(tiny_config(changes), synthetic_set, tmp_path / "run", resume=False)
    assert not (tmp_path / "run" / "checkpoints" / BEST).exists()


def test_a_few_bad_losses_are_survived_with_a_warning(
    synthetic_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, count = TrainStep.__call__, 0

    def poisoned(self: TrainStep, batch: TrainBatch, learning_rate: float) -> Loss:
        nonlocal count
        count += 1
        return original(self, batch._replace(images=batch.images * math.nan) if count == 2 else batch, learning_rate)

    monkeypatch.setattr(TrainStep, "__call__", poisoned)
    train(tiny_config(), synthetic_set, tmp_path / "run", resume=False)
    log = (tmp_path / "run" / "train.log").read_text()
    assert "warning: the loss was not finite in 1 of the last 3 steps, last at step 1 (learning rate 0.005)" in log
    assert all(bool(torch.isfinite(tensor).all()) for tensor in final_state(tmp_path / "run", STEPS).values())


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Within it, writing more than that to a file fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_checkpoint_that_does_not_fit_on_the_disk_leaves_the_old_one(finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "step_000000016.pt"
    checkpoint = load_checkpoint(finished / "checkpoints" / BEST)
    save_checkpoint(path, checkpoint)
    with (
        largest_file(100_000),
        pytest.raises(OSError, match=r"not written: File too large: .*step_000000016\.pt"),
    ):
        save_checkpoint(path, checkpoint._replace(step=99))
    assert load_checkpoint(path).step == checkpoint.step
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


def test_a_full_disk_ends_a_run_with_one_line(synthetic_set: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    with largest_file(200_000):
        result = subprocess.run(train_command((), synthetic_set, output), capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].endswith("step_000000008.pt: not written: File too large")
    assert "Traceback" not in result.stderr
    assert list((output / "checkpoints").iterdir()) == []


def test_a_checkpoint_holds_no_code(finished: Path) -> None:
    content = torch.load(finished / "checkpoints" / BEST, weights_only=True)
    assert content["format"].startswith("ssd_fast checkpoint")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 nothing", b"text"])
def test_files_that_are_no_checkpoints_are_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"file\.pt: damaged, or not a file of torch\.save: \w"):
        load_checkpoint(path)
    torch.save({"model": {}}, path)
    with pytest.raises(CheckpointError, match=r"file\.pt: not a checkpoint of this program"):
        load_checkpoint(path)
    with pytest.raises(OSError, match=r"cannot be read: No such file.*nowhere\.pt"):
        load_checkpoint(tmp_path / "nowhere.pt")
