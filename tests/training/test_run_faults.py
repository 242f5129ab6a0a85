"""Faults that a run meets: a stop within an evaluation, checkpoints with flipped bits, another job in its folder."""

import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tiny import assert_same_end, tiny_config

from ssd_fast.checkpoints.checkpoint import BEST, CheckpointError, load_checkpoint, newest_checkpoint
from ssd_fast.evaluation.detector import Detector
from ssd_fast.files import Claim
from ssd_fast.training.run import train
from ssd_fast.training.step import TrainStep
from ssd_fast.training.validation import Validation

STEPS = 16  # two epochs of eight


@contextmanager
def during(
    monkeypatch: pytest.MonkeyPatch, owner: type, name: str, number: int, action: Callable[[], object]
) -> Iterator[None]:
    """Does something before the call of that number, counted from 1, of a method."""
    original, count = getattr(owner, name), 0

    def called(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == number:
            action()
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, called)
        yield


@pytest.mark.parametrize(
    ("method", "number", "step"),
    [((Detector, "detect"), 1, 8), ((Detector, "detect"), 4, 16), ((Validation, "wait"), 1, 16)],
    ids=["first evaluation", "last evaluation", "last score"],
)
def test_a_run_stopped_within_an_evaluation_repeats_it_and_ends_as_if_uninterrupted(
    finished: Path,
    synthetic_set: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: tuple[type, str],
    number: int,
    step: int,
) -> None:
    output = tmp_path / "run"
    has_score = False  # of the last evaluation, until the run is resumed
    monkeypatch.setattr(Validation, "scored_epoch", lambda self: self.pending_epoch if has_score else 0)
    with during(monkeypatch, *method, number, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        outcome = train(tiny_config(("training.keep_checkpoints=2",)), synthetic_set, output, resume=False)
    assert outcome.stopped_by == signal.SIGTERM
    newest = newest_checkpoint(output / "checkpoints")
    assert newest is not None
    assert newest.step == step  # it was saved before the evaluation
    assert "in the evaluation, which --resume repeats" in (output / "train.log").read_text()
    has_score = True
    with during(monkeypatch, TrainStep, "__call__", 1, lambda: None) if step < STEPS else no_step(monkeypatch):
        assert train(tiny_config(), synthetic_set, output, resume=True).stopped_by == 0
    assert_same_end(output, finished, STEPS)


@contextmanager
def no_step(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within it, a training step is an error."""

    def step(*_: object) -> None:
        raise AssertionError("nothing was left to train")

    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "__call__", step)
        yield


def test_a_flipped_bit_anywhere_in_a_checkpoint_is_found_or_harmless(finished: Path, tmp_path: Path) -> None:
    content = (finished / "checkpoints" / BEST).read_bytes()
    original = load_checkpoint(finished / "checkpoints" / BEST)
    path = tmp_path / "flipped.pt"
    chance = random.Random(0)
    found = 0
    for place in [chance.randrange(len(content)) for _ in range(60)]:
        flipped = bytearray(content)
        flipped[place] ^= 1 << chance.randrange(8)
        path.write_bytes(flipped)
        try:
            loaded = load_checkpoint(path)
        except CheckpointError:
            found += 1
        else:  # in a place that nothing reads
            assert all(loaded.model[name].equal(tensor) for name, tensor in original.model.items())
    assert found > 50


def test_a_run_resumes_before_a_damaged_checkpoint_and_keeps_the_good_one(
    finished: Path, synthetic_set: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "run"
    config = tiny_config(("training.keep_checkpoints=2", "training.checkpoint_every_steps=3"))
    with during(monkeypatch := pytest.MonkeyPatch(), TrainStep, "__call__", 7, lambda: os.kill(os.getpid(), 15)):
        train(config, synthetic_set, output, resume=False)
    monkeypatch.undo()
    newest = output / "checkpoints" / "step_000000007.pt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    with during(monkeypatch, TrainStep, "__call__", 1, lambda: os.kill(os.getpid(), 15)):
        train(config, synthetic_set, output, resume=True)
    monkeypatch.undo()
    assert "step_000000007.pt: damaged: " in caplog.text
    assert {path.name for path in newest.parent.iterdir()} == {
        "step_000000006.pt",
        "step_000000007.pt",
        "step_000000007.pt.damaged",
    }
    assert train(config, synthetic_set, output, resume=True).stopped_by == 0
    assert load_checkpoint(output / "checkpoints" / f"step_{STEPS:09d}.pt").step == STEPS


def test_a_checkpoint_for_which_there_is_no_memory_is_not_damaged(finished: Path) -> None:
    checkpoints = sorted((finished / "checkpoints").glob("step_*.pt"))
    limit = f"""
import os, resource
from pathlib import Path
from ssd_fast.checkpoints.checkpoint import newest_checkpoint
pages = int(Path("/proc/self/statm").read_text().split()[0])
for more in range(0, 2**24, 2**18):  # bytes: refused in another place each time
    if child := os.fork():
        os.waitpid(child, 0)
        continue
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, resource.RLIM_INFINITY))
    try:
        newest, error = newest_checkpoint(Path({str(finished / "checkpoints")!r})), ""
    except MemoryError as refused:
        newest, error = None, str(refused)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(newest.step if newest else {checkpoints[-1].name!r} in error, flush=True)
    os._exit(0)
"""
    ended = subprocess.run([sys.executable, "-c", limit], capture_output=True, text=True, check=False)
    assert ended.stderr == ""
    assert ended.stdout.startswith("True\n")
    assert set(ended.stdout.split()) <= {"True", str(STEPS)}
    assert sorted((finished / "checkpoints").glob("step_*.pt")) == checkpoints


def test_a_checkpoint_that_cannot_be_read_now_is_not_damaged(
    finished: Path, synthetic_set: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    away = output / "checkpoints" / "step_000000099.pt"
    away.symlink_to(away.name)  # an error of the file system, as of a server that is away
    with pytest.raises(OSError, match=r"cannot be read: Too many levels of symbolic links.*step_000000099\.pt"):
        train(tiny_config(), synthetic_set, output, resume=True)
    assert away.is_symlink()


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(
    finished: Path, synthetic_set: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    newest = output / "checkpoints" / f"step_{STEPS:09d}.pt"
    newest.write_bytes(newest.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"checkpoints: none of its checkpoints can be read: expected one to res"):
        train(tiny_config(), synthetic_set, output, resume=True)
    assert newest.exists()


def test_a_second_job_in_the_folder_of_a_run_is_refused(finished: Path, synthetic_set: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    holder = f"{os.uname().nodename}, process {os.getpid()}"
    claim = Claim(output / "lock", "a test")
    with pytest.raises(ValueError, match=f"run: in use by {holder}: expected to be used by one"):
        train(tiny_config(("training.epochs=3",)), synthetic_set, output, resume=True)
    claim.close()
    del before[output / "lock"]
    assert {path: path.read_bytes() for path in before} == before
    train(tiny_config(), synthetic_set, output, resume=True)  # the claim has ended


def test_a_claim_ends_with_the_process_that_holds_it(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    code = "import os, pathlib, ssd_fast.files, sys; c = ssd_fast.files.Claim(pathlib.Path(sys.argv[1]), 'it')"
    subprocess.run([sys.executable, "-c", f"{code}; os.kill(os.getpid(), 9)", str(lock)], check=False)
    assert ", process " in lock.read_text()
    Claim(lock, "it").close()
    assert lock.read_text().endswith(f"process {os.getpid()}\n")


def test_a_folder_that_is_replaced_under_a_run_ends_it(
    synthetic_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"

    def replace() -> None:
        output.rename(tmp_path / "away")
        (output / "checkpoints").mkdir(parents=True)

    config = tiny_config(("training.checkpoint_every_steps=1",))
    with (
        during(monkeypatch, TrainStep, "__call__", 5, replace),
        pytest.raises(OSError, match=f"removed or replaced while it was in use: '{output}'"),
    ):
        train(config, synthetic_set, output, resume=False)
    assert list((output / "checkpoints").iterdir()) == []
    newest = newest_checkpoint(tmp_path / "away" / "checkpoints")
    assert newest is not None
    assert newest.step == 4
