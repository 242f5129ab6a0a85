"""Whole runs and evaluations by several ranks: the result of one, also when they were stopped or killed in between."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from ranks import WORKER, Ended, horovodrun_environment, needs_horovod, rendezvous, run_job
from repository import REPOSITORY
from tiny import assert_same_end, tiny_config

from ssd_fast.checkpoints.checkpoint import BEST, Checkpoint, CheckpointError, load_checkpoint, newest_checkpoint
from ssd_fast.training.history import read_metrics
from ssd_fast.training.run import train
from ssd_fast.training.scores import read_scores

STEPS = 16  # two epochs of eight: two ranks with four images each of 64
EVERY_STEP = "training.checkpoint_every_steps=1"


def run_ranks(
    size: int, data: Path, output: Path, *overrides: str, resume: bool = False, act: Sequence[object] = (-1, 0, "")
) -> list[Ended]:
    """Train as two ranks or more; act: rank, step, and what that rank does in that step."""
    place = [str(data), str(output), "resume" if resume else "new", *map(str, act)]
    return run_job(size, WORKER, "run", *place, *overrides)


@pytest.fixture(scope="module")
def finished(synthetic_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run by two ranks that nothing interrupted."""
    output = tmp_path_factory.mktemp("runs") / "finished"
    for ended in run_ranks(2, synthetic_set, output):
        assert ended.status == 0, ended.errors
    return output


def newest(output: Path) -> Checkpoint:
    checkpoint = newest_checkpoint(output / "checkpoints")
    assert checkpoint is not None
    return checkpoint


@needs_horovod
def test_a_run_of_two_ranks_stopped_killed_and_resumed_ends_as_if_uninterrupted(
    finished: Path, synthetic_set: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    stopped = run_ranks(2, synthetic_set, output, act=(1, 3, "term"))
    assert [ended.status for ended in stopped] == [143, 143]
    assert newest(output).step == 4  # agreed on at the next step
    assert (output / "interrupted").read_text() == "signal 15, step 4\n"

    killed = run_ranks(2, synthetic_set, output, EVERY_STEP, resume=True, act=(1, 7, "kill"))
    assert [ended.status for ended in killed] == [1, -9]
    lines = killed[0].error_lines()
    assert len(lines) == 1
    assert "error: rank 1 (node0, process " in lines[0]
    assert ") gives no sign of life: killed, stopped or cut off" in lines[0]
    assert not (output / "interrupted").exists()

    resumed = run_ranks(2, synthetic_set, output, resume=True)
    assert [ended.status for ended in resumed] == [0, 0]
    assert_same_end(output, finished, STEPS)
    records = [record for record in read_metrics(output / "metrics.jsonl") if record["kind"] == "eval"]
    assert records == [record for record in read_metrics(finished / "metrics.jsonl") if record["kind"] == "eval"]


@needs_horovod
def test_ranks_whose_clocks_are_an_hour_apart_end_as_others(
    finished: Path, synthetic_set: Path, tmp_path: Path
) -> None:
    output, library = tmp_path / "run", tmp_path / "skewed_clock.so"
    source = REPOSITORY / "tests" / "support" / "skewed_clock.cpp"
    subprocess.run([os.environ.get("CXX", "g++"), "-shared", "-fPIC", "-o", library, source], check=True)
    command = [sys.executable, WORKER, "run", str(synthetic_set), str(output), "new", "-1", "0", ""]
    ranks = []
    with rendezvous() as port:
        for rank in range(2):
            clock = {"LD_PRELOAD": str(library), "CLOCK_SKEW": str(3600 * rank)}
            environment = {**os.environ, **horovodrun_environment(rank, 2, port), "HOROVOD_GLOO_IFACE": "lo", **clock}
            ranks.append(subprocess.Popen(command, env=environment))
        assert [rank.wait(300) for rank in ranks] == [0, 0]
    assert_same_end(output, finished, STEPS)


@needs_horovod
def test_the_main_rank_alone_leaves_records_and_they_say_that_all_weights_are_the_same(finished: Path) -> None:
    log = (finished / "train.log").read_text()
    assert log.count("step 16: weights of all 2 ranks: ") == 1
    assert log.count("epoch 2/2 step 8/8") == 1
    assert {path.name for path in (finished / "checkpoints").iterdir()} == {BEST, f"step_{STEPS:09d}.pt"}


@needs_horovod
def test_a_run_is_resumed_by_as_many_processes_as_it_had(finished: Path, synthetic_set: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    with pytest.raises(CheckpointError, match=r"copy: a run of 2 processes: expected as many to resume it, not 1"):
        train(tiny_config(("training.epochs=3",)), synthetic_set, copy, resume=True)


@needs_horovod
def test_training_goes_on_while_a_score_is_computed_which_then_stops_all_ranks(
    synthetic_set: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    log_file = output / "train.log"
    slow = tmp_path / "slow"  # scores when the training has gone on
    wait = f"until grep -q 'epoch 2/100 step 3/8' '{log_file}'; do sleep 0.1; done"
    slow.write_text(f'#!/bin/sh\n{wait}\nexec {sys.executable} "$@"\n')
    slow.chmod(0o755)
    overrides = ("evaluation.target_map=0.0", "training.epochs=100")
    ranks = run_ranks(2, synthetic_set, output, *overrides, act=(0, 1, slow))
    assert [ended.status for ended in ranks] == [0, 0], ranks[0].errors
    log = log_file.read_text()
    assert log.index("epoch 2/100 step 3/8") < log.index("epoch 1/100 mAP")
    best = load_checkpoint(output / "checkpoints" / BEST)
    assert best.step == 8
    assert list(read_scores(output / "scores.json", until_epoch=99).by_epoch) == [1]
    assert '"status": "success"' in (output / "mlperf.log").read_text()
    assert train(tiny_config(overrides), synthetic_set, output, resume=True).reached_target


@needs_horovod
def test_evaluation_by_two_and_three_ranks_gives_the_bits_of_one(
    finished: Path, synthetic_set: Path, tmp_path: Path
) -> None:
    command = ["-m", "ssd_fast", "evaluate"]
    command += ["--checkpoint", str(finished / "checkpoints" / BEST), "--data", str(synthetic_set)]
    command += ["--set", "evaluation.batch_size=4", "--set", "detection.score_threshold=0.01"]
    alone = run_job(1, *command, "--output", str(tmp_path / "1.json"))[0]
    assert alone.output.count("Average") == 12
    assert len(json.loads((tmp_path / "1.json").read_text())) > 100
    for size in (2, 3):
        ranks = run_job(size, *command, "--output", str(tmp_path / f"{size}.json"))
        assert [ended.status for ended in ranks] == [0] * size, ranks[0].errors
        assert [ended.output for ended in ranks] == [alone.output, *[""] * (size - 1)]
        assert (tmp_path / f"{size}.json").read_bytes() == (tmp_path / "1.json").read_bytes()


@needs_horovod
def test_an_image_that_becomes_unreadable_to_one_rank_is_named_and_ends_both(
    synthetic_set: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(synthetic_set, data)
    image = sorted((data / "train2017").iterdir())[20]
    ranks = run_ranks(2, data, tmp_path / "run", act=(0, 1, image))
    assert [ended.status for ended in ranks] == [1, 1], ranks
    reader = next(rank for rank, ended in enumerate(ranks) if "ImageError" in ended.errors)
    (line,) = [line for ended in ranks for line in ended.error_lines()]
    assert line.startswith(f"error: rank {reader} (node0, process ")
    assert image.name in line


def test_apex_is_refused_without_a_gpu_by_the_key_that_asks_for_it(synthetic_set: Path, tmp_path: Path) -> None:
    for change, message in (
        ("optimizer.implementation=apex", r"optimizer\.implementation = 'apex': expected a GPU"),
        ("distributed.batch_norm_group=2", r"distributed\.batch_norm_group = 2: expected a GPU"),
    ):
        with pytest.raises(ValueError, match=message):
            train(tiny_config((change,)), synthetic_set, tmp_path / "run", resume=False)
