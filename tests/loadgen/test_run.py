"""Runs of LoadGen: its four scenarios, and how a run ends that cannot go on."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from short_benchmark import DEMO, SHORT, load_set, sets
from small_set import make_set
from tiny import tiny_config

from ssd_fast.data.annotations import NUMBERED_CATEGORIES
from ssd_fast.data.policy import DataError
from ssd_fast.evaluation.detector import make_random_detector
from ssd_fast.loadgen import run as loadgen
from ssd_fast.loadgen.logs import read_figures
from ssd_fast.loadgen.settings import Scenario
from ssd_fast.model.ssd import SSD

pytest.importorskip("mlperf_loadgen")
Run = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize("scenario", Scenario)
def test_every_scenario_is_valid_by_its_own_figures(run: Run, tmp_path: Path, scenario: Scenario) -> None:
    status, out, _ = run("--config", DEMO, "--scenario", scenario, "--output", tmp_path, *sets())
    assert status == 0, out
    summary = (tmp_path / "mlperf_log_summary.txt").read_text()
    assert "Result is : VALID" in summary
    assert "No errors encountered" in summary
    table = dict(line.split("  ", 1) for line in out.splitlines())
    assert table["result"].strip() == "VALID"
    figures = read_figures(tmp_path / "mlperf_log_detail.txt")
    assert figures["effective_samples_per_query"] == {"Offline": 220, "MultiStream": 8}.get(scenario, 1)
    samples = figures["result_query_count"] * figures["effective_samples_per_query"]
    assert table["images"].split()[0] == str(samples)
    metric, unit, figure = {
        "Offline": ("throughput", 1, figures.get("result_samples_per_second")),
        "SingleStream": ("p90 of the latency", 1e6, figures.get("result_90.00_percentile_latency_ns")),
        "Server": ("p50 of the latency", 1e6, figures.get("result_50.00_percentile_latency_ns")),
        "MultiStream": ("p50 of the latency", 1e6, figures.get("result_50.00_percentile_per_query_latency_ns")),
    }[scenario]
    assert figure is not None
    assert float(table[metric].split()[0]) == pytest.approx(figure / unit, rel=1e-3, abs=0.006)


def test_a_bound_that_is_missed_is_named_and_fails(run: Run, tmp_path: Path) -> None:
    changes = sets("benchmark.server_latency_ms=0.001")
    status, out, _ = run("--config", DEMO, "--scenario", "Server", "--output", tmp_path, *changes)
    assert status == 1
    assert "INVALID" in out
    assert "invalid because     the latency exceeds its bound" in out
    status, out, _ = run("--config", DEMO, "--scenario", "Server", "--find-load", "--output", tmp_path, *changes)
    assert status == 1
    assert "benchmark.server_qps = 100, where the search starts, is too much" in out


FAILING = """
import sys
from ssd_fast.__main__ import main
from ssd_fast.evaluation.detector import Detector

detect, calls = Detector.detect, []

def failing(self, images):
    calls.append(images)
    if len(calls) > 20:
        raise RuntimeError("the device is gone")
    return detect(self, images)

Detector.detect = failing
sys.argv[0] = "ssd-fast"
main()
"""


def run_apart(code: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, "benchmark", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"},
        check=False,
    )


def test_an_error_while_serving_ends_the_run_with_its_message(tmp_path: Path) -> None:
    changes = sets("benchmark.min_duration_s=600", "benchmark.server_batch_size=2")
    ended = run_apart(FAILING, "--config", DEMO, "--scenario", "Server", "--output", tmp_path, *changes)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == "RuntimeError: the device is gone"


def test_a_damaged_image_ends_the_run_with_its_name(synthetic_set: Path, tmp_path: Path) -> None:
    data, weights = tmp_path / "data", tmp_path / "weights.pt"
    model = SSD(tiny_config().model, num_classes=len(load_set(synthetic_set).categories))
    torch.save(model.state_dict(), weights)
    (data / "val2017").mkdir(parents=True)
    (data / "annotations").symlink_to(synthetic_set / "annotations")
    for image in (synthetic_set / "val2017").iterdir():
        content = image.read_bytes()
        start = content.index(b"\xff\xda")
        (data / "val2017" / image.name).write_bytes(content[:start] + b"\xff\xd9")
    options: list[str | Path] = ["--config", DEMO, "--checkpoint", weights, "--data", data]
    options += ["--scenario", "SingleStream", "--output", tmp_path / "logs", *sets("benchmark.min_duration_s=600")]
    ended = run_apart("from ssd_fast.__main__ import main; main()", *options)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith(f"error: {data / 'val2017'}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scenario", "Offline"], "expected --checkpoint, or --config"),
        (["--scenario", "Offline", "--config", DEMO, "--accuracy"], "--accuracy: expected --data and --checkpoint"),
        (["--scenario", "Offline", "--config", DEMO, "--find-load"], "--find-load: expected --scenario Server"),
        (
            ["--scenario", "Offline", "--config", DEMO, "--set", "benchmark.offline_batch_size=0"],
            "benchmark.offline_batch_size = 0: expected greater than 0",
        ),
    ],
)
def test_bad_calls_are_refused(run: Run, tmp_path: Path, options: list, message: str) -> None:
    status, _, err = run("--output", tmp_path / "logs", *options)
    assert status == 1
    assert message in err.splitlines()[-1]
    assert not (tmp_path / "logs").exists()


def test_images_left_out_would_shift_the_log(synthetic_set: Path, tmp_path: Path) -> None:
    coco_set = load_set(synthetic_set)._replace(num_left_out_images=1)
    config = tiny_config(SHORT)
    detector = make_random_detector(config, NUMBERED_CATEGORIES, torch.device("cpu"))
    with pytest.raises(DataError, match="1 of its images are left out"):
        loadgen.run(
            detector,
            config,
            scenario=Scenario.OFFLINE,
            mode="accuracy",
            coco_set=coco_set,
            output=tmp_path,
            device=torch.device("cpu"),
        )


def test_the_accuracy_of_a_set_without_boxes_is_refused_before_loadgen_starts(tmp_path: Path) -> None:
    (tmp_path / "val.json").write_text(json.dumps(make_set(tmp_path) | {"annotations": []}))
    places = ('data.val_annotations="val.json"', 'data.val_images="."')
    checkpoint = tmp_path / "weights.pt"
    torch.save(SSD(tiny_config().model, num_classes=2).state_dict(), checkpoint)
    with pytest.raises(DataError, match=r"val\.json: no image has a box of the network's classes: .* --accuracy"):
        loadgen.benchmark(
            checkpoint,
            tmp_path,
            tmp_path / "logs",
            scenario=Scenario.OFFLINE,
            mode="accuracy",
            config=tiny_config((*SHORT, *places)),
        )
    assert not (tmp_path / "logs").exists()


def test_without_loadgen_it_says_how_to_install_it(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status, _, err = run("--config", DEMO, "--scenario", "Offline", "--output", tmp_path, *sets())
    assert status == 1
    assert "pip install '.[loadgen]'" in err.splitlines()[-1]
