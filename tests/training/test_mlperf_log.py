"""The MLPerf log of a run is what the compliance checker of mlperf_logging accepts."""

import json
import logging
import resource
from pathlib import Path
from typing import Any, Literal

import pytest
from mlperf_logging.compliance_checker import mlp_compliance
from mlperf_logging.package_checker.seed_checker import SeedChecker
from repository import REPOSITORY

from ssd_fast.config.recipe import load_config
from ssd_fast.config.sections import Config
from ssd_fast.training.mlperf_log import MlperfLog

RULESETS = ["0.7.0", "1.0.0"]


@pytest.fixture(scope="module")
def recipe() -> Config:
    return load_config(REPOSITORY / "configs" / "ssd300.toml")


def write_run(
    directory: Path,
    recipe: Config,
    *,
    best_map: float = 0.231,
    reached_at: int = 50,
    division: Literal["closed", "open"] = "closed",
    **changes: Any,
) -> None:
    """The log of a pretended run of a recipe on COCO that stops at the first evaluation of mAP best_map."""
    log = MlperfLog(directory / "mlperf.log")
    log.init_start(organization="an organization", platform="1xC4140", division=division)
    figures: dict[str, Any] = {
        "seed": 17,
        "train_samples": 117266,
        "eval_samples": 5000,
        "global_batch_size": recipe.training.batch_size,
        "learning_rate": recipe.optimizer.effective_learning_rate(recipe.training.batch_size),
        "weight_decay": recipe.optimizer.weight_decay,
        "warmup_steps": recipe.optimizer.warmup_steps,
        "decay_epochs": recipe.optimizer.decay_epochs,
        "bn_span": recipe.training.batch_size,
        "crop_attempts": recipe.augmentation.crop_attempts,
    }
    log.init_stop(**{**figures, **changes})
    log.run_start(evaluation_epochs={*recipe.evaluation.epochs, recipe.training.epochs})
    for epoch in range(1, reached_at + 1):
        log.epoch_start(epoch)
        log.epoch_stop(epoch)
        if epoch in recipe.evaluation.epochs:
            log.eval_start(epoch)
            log.eval_stop(epoch, best_map if epoch == reached_at else 0.2)
    log.run_stop(success=best_map >= 0.23)
    log.close()


def events(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix(":::MLLOG ")) for line in path.read_text().splitlines()]


def keys(path: Path) -> list[str]:
    return [event["key"] for event in events(path)]


def accepts(path: Path, ruleset: str) -> bool:
    checker = mlp_compliance.make_checker("training", ruleset, quiet=False, werror=True)
    return bool(mlp_compliance.main(str(path), f"training_{ruleset}/common.yaml", checker)[0])


@pytest.mark.parametrize("ruleset", RULESETS)
def test_checker_accepts_a_run_of_the_recipe_that_reached_the_target(
    tmp_path: Path, recipe: Config, ruleset: str
) -> None:
    write_run(tmp_path, recipe)
    assert accepts(tmp_path / "mlperf.log", ruleset)
    assert SeedChecker(ruleset).check_seeds([tmp_path / "mlperf.log"])


@pytest.mark.parametrize("ruleset", RULESETS)
@pytest.mark.parametrize("key", ["run_start", "run_stop", "block_start", "eval_accuracy", "max_samples", "cache_clear"])
def test_checker_refuses_a_log_with_an_event_left_out(tmp_path: Path, recipe: Config, ruleset: str, key: str) -> None:
    write_run(tmp_path, recipe)
    path = tmp_path / "mlperf.log"
    left_out = {key} if key != "block_start" else {"block_start", "epoch_start"}  # either of them is enough
    kept = [
        line
        for line, event in zip(path.read_text().splitlines(), events(path), strict=True)
        if event["key"] not in left_out
    ]
    path.write_text("\n".join(kept))
    assert not accepts(path, ruleset)


@pytest.mark.parametrize(
    "change",
    [
        {"best_map": 0.229},
        {"warmup_steps": 0},
        {"decay_epochs": (44,)},
        {"decay_epochs": (44, 54)},
        {"crop_attempts": 2},
    ],
)
def test_checker_refuses_the_runs_that_the_documentation_says_it_does(
    tmp_path: Path, recipe: Config, change: dict[str, Any]
) -> None:
    write_run(tmp_path, recipe, **change)
    assert not accepts(tmp_path / "mlperf.log", "1.0.0")


def test_checker_accepts_any_finished_run_in_the_open_division(tmp_path: Path, recipe: Config) -> None:
    changes = {"warmup_steps": 0, "decay_epochs": (), "crop_attempts": 2}
    write_run(tmp_path, recipe, best_map=0.05, reached_at=33, division="open", **changes)
    assert accepts(tmp_path / "mlperf.log", "1.0.0")


def test_events_come_in_the_order_of_the_benchmark(tmp_path: Path, recipe: Config) -> None:
    write_run(tmp_path, recipe, reached_at=33)
    found = keys(tmp_path / "mlperf.log")
    before = [
        "submission_benchmark",
        "submission_org",
        "submission_division",
        "submission_status",
        "submission_platform",
        "cache_clear",
        "init_start",
        "seed",
        "train_samples",
        "eval_samples",
        "global_batch_size",
        "gradient_accumulation_steps",
        "opt_base_learning_rate",
        "opt_weight_decay",
        "opt_learning_rate_warmup_steps",
        "opt_learning_rate_warmup_factor",
        "opt_learning_rate_decay_boundary_epochs",
        "model_bn_span",
        "max_samples",
        "init_stop",
        "run_start",
        "block_start",
    ]
    epochs = ["epoch_start", "epoch_stop"] * 33
    assert found == before + epochs + ["eval_start", "eval_accuracy", "eval_stop", "block_stop", "run_stop"]


def test_blocks_end_with_the_evaluations(tmp_path: Path, recipe: Config) -> None:
    write_run(tmp_path, recipe, reached_at=55)
    found = events(tmp_path / "mlperf.log")
    starts = [event["metadata"] for event in found if event["key"] == "block_start"]
    stops = [event["metadata"] for event in found if event["key"] == "block_stop"]
    assert [(start["first_epoch_num"], start["epoch_count"]) for start in starts] == [
        (1, 33),
        (34, 11),
        (45, 6),
        (51, 5),
    ]
    assert [stop["first_epoch_num"] for stop in stops] == [1, 34, 45, 51]


def test_values_and_status_are_the_given_ones(tmp_path: Path, recipe: Config) -> None:
    write_run(tmp_path, recipe, best_map=0.1, reached_at=33)
    found = {event["key"]: event for event in events(tmp_path / "mlperf.log")}
    assert found["opt_base_learning_rate"]["value"] == 0.0025
    assert found["opt_learning_rate_decay_boundary_epochs"]["value"] == [44, 55]
    assert found["eval_accuracy"]["value"] == 0.1
    assert found["eval_accuracy"]["metadata"]["epoch_num"] == 33
    assert found["run_stop"]["metadata"]["status"] == "aborted"


def test_events_name_the_caller_and_not_the_wrapper(tmp_path: Path, recipe: Config) -> None:
    write_run(tmp_path, recipe, reached_at=33)
    source = Path(__file__).read_text().splitlines()
    for event in events(tmp_path / "mlperf.log"):
        assert event["metadata"]["file"] == "tests/training/test_mlperf_log.py"
        assert "log." in source[event["metadata"]["lineno"] - 1], event


def test_two_logs_in_one_process_stay_apart_and_off_the_screen(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with caplog.at_level(logging.DEBUG):
        first, second = MlperfLog(tmp_path / "a" / "mlperf.log"), MlperfLog(tmp_path / "b" / "mlperf.log")
        first.run_start(evaluation_epochs=[1])
        second.epoch_start(1)
        first.run_stop(success=False)
        first.close()
        second.close()
    assert keys(tmp_path / "a" / "mlperf.log") == ["run_start", "run_stop"]
    assert keys(tmp_path / "b" / "mlperf.log") == ["block_start", "epoch_start"]
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_a_resumed_run_has_a_file_of_its_own(tmp_path: Path) -> None:
    for attempt in (None, 3, 5):
        log = MlperfLog(tmp_path / "mlperf.log")
        log.run_start(evaluation_epochs=[9], resumed_epoch=attempt)
        log.close()
    names = ["mlperf.1.log", "mlperf.2.log", "mlperf.log"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    starts = [events(tmp_path / name) for name in names]
    assert [len(start) for start in starts] == [1, 1, 1]
    assert [start[0]["metadata"].get("resumed_epoch") for start in starts] == [None, 3, 5]


def test_other_ranks_write_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    log = MlperfLog(None)
    log.init_start(organization="an organization", platform="a platform", division="open")
    log.epoch_start(1)
    log.run_stop(success=True)
    log.close()
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


def test_full_disk_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    log = MlperfLog(tmp_path / "mlperf.log")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # a file may not grow past 100 bytes
    try:
        with pytest.raises(OSError, match=r"mlperf\.log"):
            log.init_start(organization="an organization", platform="a platform", division="open")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        log.close()
