"""MLPerf LoadGen: its scenarios, the accuracy log, and that every query is answered once."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from repository import REPOSITORY
from tiny import TINY, tiny_config

import kernels
from ssd_fast.__main__ import main
from ssd_fast.data.coco import NUMBERED_CATEGORIES, CocoSet, DataError, load_coco
from ssd_fast.data.loaders import make_eval_loader
from ssd_fast.distributed.world import World
from ssd_fast.evaluation.coco_eval import read_results, score, twelve_numbers
from ssd_fast.evaluation.detector import make_random_detector
from ssd_fast.loadgen import run as loadgen
from ssd_fast.recipe import load_config

mlperf_loadgen = pytest.importorskip("mlperf_loadgen")
Run = Callable[..., tuple[int, str, str]]
DEMO = REPOSITORY / "configs" / "demo.toml"
SHORT = (
    "benchmark.performance_samples=4",
    "benchmark.min_duration_s=0.2",
    "benchmark.single_stream_min_queries=64",
    "benchmark.multi_stream_min_queries=16",
    "benchmark.multi_stream_percentile=50",
    "benchmark.server_min_queries=30",
    "benchmark.server_percentile=50",
    "benchmark.server_latency_ms=60000",
    "benchmark.server_qps=100",
    "benchmark.offline_min_samples=20",
    "benchmark.offline_batch_size=8",
    "benchmark.offline_qps=1000",
)


def sets(*changes: str) -> list[str]:
    return [part for change in (*TINY, *SHORT, *changes) for part in ("--set", change)]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `ssd-fast benchmark ARGUMENTS` in this process: exit status, stdout, stderr."""

    def run_main(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ssd-fast", "benchmark", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_info:
            main()
        code = exit_info.value.code
        out, err = capsys.readouterr()
        return (1, out, err + code) if isinstance(code, str) else (int(code or 0), out, err)

    return run_main


@pytest.mark.parametrize("scenario", ["Offline", "SingleStream", "Server", "MultiStream"])
def test_every_scenario_is_valid_by_its_own_figures(run: Run, tmp_path: Path, scenario: str) -> None:
    status, out, _ = run("--config", DEMO, "--scenario", scenario, "--output", tmp_path, *sets())
    assert status == 0, out
    summary = (tmp_path / "mlperf_log_summary.txt").read_text()
    assert "Result is : VALID" in summary
    assert "No errors encountered" in summary
    table = dict(line.split("  ", 1) for line in out.splitlines())
    assert table["result"].strip() == "VALID"
    figures = loadgen.read_figures(tmp_path / "mlperf_log_detail.txt")
    assert figures["effective_samples_per_query"] == {"Offline": 220, "MultiStream": 8}.get(scenario, 1)
    samples = figures["result_query_count"] * figures["effective_samples_per_query"]
    assert table["images"].split()[0] == str(samples)
    metric, unit, figure = {
        "Offline": ("throughput", 1, figures.get("result_samples_per_second")),
        "SingleStream": ("p90 of the latency", 1e6, figures.get("result_90.00_percentile_latency_ns")),
        "Server": ("p50 of the latency", 1e6, figures.get("result_50.00_percentile_latency_ns")),
        "MultiStream": ("p50 of the latency", 1e6, figures.get("result_50.00_percentile_per_query_latency_ns")),
    }[scenario]
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


def test_settings_are_those_of_the_last_round_with_this_detector() -> None:
    settings = load_config(REPOSITORY / "configs" / "ssd1200.toml").benchmark
    made = {
        scenario: loadgen.make_settings(mlperf_loadgen, settings, scenario, "performance", batch_seconds=0.1)
        for scenario in ("Offline", "SingleStream", "Server", "MultiStream")
    }
    assert {scenario: one.min_query_count for scenario, one in made.items()} == {
        "Offline": 24576,
        "SingleStream": 1024,
        "Server": 270336,
        "MultiStream": 270336,
    }
    for scenario, one in made.items():
        assert one.min_duration_ms == 600_000
        assert one.scenario == getattr(mlperf_loadgen.TestScenario, scenario)
        assert one.mode == mlperf_loadgen.TestMode.PerformanceOnly
        assert one.qsl_rng_seed == 6655344265603136530
    assert made["SingleStream"].single_stream_target_latency_percentile == 0.9
    assert made["MultiStream"].multi_stream_target_latency_percentile == 0.99
    assert made["MultiStream"].multi_stream_samples_per_query == 8
    assert made["Server"].server_target_latency_percentile == 0.99
    assert made["Server"].server_target_latency_ns == 100_000_000
    assert made["Offline"].offline_expected_qps == pytest.approx(1.1 * 32 / 0.1)
    assert settings.performance_samples == 64


@pytest.fixture(scope="module")
def shuffled_set(synthetic_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The synthetic set with its images and its categories in another order than that of their ids."""
    directory = tmp_path_factory.mktemp("loadgen") / "data"
    (directory / "annotations").mkdir(parents=True)
    (directory / "val2017").symlink_to(synthetic_set / "val2017")
    content = json.loads((synthetic_set / "annotations" / "instances_val2017.json").read_text())
    content["images"] = content["images"][::2] + content["images"][1::2]
    content["categories"].reverse()
    (directory / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    return directory


MANY = "detection.score_threshold=0.01"  # detections of random weights


@pytest.fixture(scope="module")
def weights(shuffled_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, which detect well: their best detections become the ground truths of the set."""
    annotations = shuffled_set / "annotations" / "instances_val2017.json"
    config, device, coco_set = tiny_config([MANY]), torch.device("cpu"), load_set(shuffled_set)
    detector = make_random_detector(config, coco_set.categories, device)
    table = detector.detect_set(make_eval_loader(config, coco_set.images, device), coco_set, World())
    content = json.loads(annotations.read_text())
    best = [np.flatnonzero(table.image_ids == image["id"])[:20:4] for image in content["images"]]
    content["annotations"] = [
        {"id": row + 1, "image_id": image_id, "category_id": category_id, "bbox": box, "area": box[2] * box[3]}
        for row, image_id, category_id, box in zip(
            np.concatenate(best).tolist(),
            *(column[np.concatenate(best)].tolist() for column in (table.image_ids, table.category_ids)),
            table.boxes_xywh[np.concatenate(best)].tolist(),
            strict=True,
        )
    ]
    annotations.write_text(json.dumps(content))
    path = tmp_path_factory.mktemp("weights") / "weights.pt"
    torch.save(detector.model.state_dict(), path)
    return path


def read_published_format(log: Path, annotations: Path) -> list[dict]:
    """COCO results from an accuracy log, as MLPerf's own script reads it: numbers are positions in the file."""
    truth = COCO(annotations)
    category_ids = [0, *truth.getCatIds()]
    results, seen = [], set()
    for entry in json.loads(log.read_text()):
        if entry["qsl_idx"] in seen:
            continue
        seen.add(entry["qsl_idx"])
        image = truth.dataset["images"][entry["qsl_idx"]]
        rows = np.frombuffer(bytes.fromhex(entry["data"]), "<f4").reshape(-1, 7).astype(np.float64)
        for position, top, left, bottom, right, confidence, label in rows.tolist():
            assert position == entry["qsl_idx"]
            left, right = left * image["width"], right * image["width"]
            top, bottom = top * image["height"], bottom * image["height"]
            box = [left, top, right - left, bottom - top]
            category_id = category_ids[int(label)]
            results.append({"image_id": image["id"], "category_id": category_id, "bbox": box, "score": confidence})
    assert len(seen) == len(truth.dataset["images"])
    return results


@pytest.mark.parametrize("scenario", ["Offline", "MultiStream"])
def test_accuracy_log_holds_what_evaluate_finds(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    shuffled_set: Path,
    weights: Path,
    tmp_path: Path,
    scenario: str,
) -> None:
    options = ["--config", DEMO, "--checkpoint", weights, "--data", shuffled_set]
    changes = sets(MANY)
    status, out, _ = run(*options, "--scenario", scenario, "--accuracy", "--output", tmp_path, *changes)
    assert status == 0, out

    results = tmp_path / "evaluated.json"
    monkeypatch.setattr(sys, "argv", ["ssd-fast", "evaluate", *map(str, [*options, "--output", results, *changes])])
    with pytest.raises(SystemExit) as exit_info:
        main()
    assert not exit_info.value.code
    annotations = shuffled_set / "annotations" / "instances_val2017.json"
    evaluated = read_results(results)
    (tmp_path / "logged.json").write_text(
        json.dumps(read_published_format(tmp_path / "mlperf_log_accuracy.json", annotations))
    )
    logged = read_results(tmp_path / "logged.json")
    assert len(evaluated.scores) > 200
    assert len(set(evaluated.category_ids.tolist())) > 1
    order = np.argsort([evaluated.image_ids.tolist().index(image_id) for image_id in logged.image_ids], kind="stable")
    for found, expected in zip(logged, evaluated, strict=True):
        np.testing.assert_allclose(found[order], expected, rtol=1e-4, atol=1e-4)
    own = loadgen.read_accuracy_log(tmp_path / "mlperf_log_accuracy.json", load_set(shuffled_set))
    assert twelve_numbers(score(annotations, own)) == twelve_numbers(score(annotations, logged))
    expected_map = score(annotations, evaluated).map
    assert expected_map > 0.1
    assert score(annotations, own).map == pytest.approx(expected_map, abs=1e-6)
    assert f"all | maxDets=100 ] = {expected_map:.3f}" in out


def load_set(directory: Path) -> CocoSet:
    return load_coco(directory / "annotations" / "instances_val2017.json", directory / "val2017")


def test_a_log_that_is_not_whole_or_mixed_up_is_refused(synthetic_set: Path, tmp_path: Path) -> None:
    coco_set = load_set(synthetic_set)
    log = tmp_path / "log.json"
    entries = [{"seq_id": n, "qsl_idx": n, "data": ""} for n in range(16)]
    log.write_text(json.dumps(entries))
    assert len(loadgen.read_accuracy_log(log, coco_set).scores) == 0
    log.write_text(json.dumps(entries[1:]))
    with pytest.raises(DataError, match=r"log\.json: holds 15 images: expected each of the 16"):
        loadgen.read_accuracy_log(log, coco_set)
    entries[3]["data"] = np.array([5, 0, 0, 1, 1, 0.5, 1], np.float32).tobytes().hex()
    log.write_text(json.dumps(entries))
    with pytest.raises(DataError, match="qsl_idx 3 has rows of another image"):
        loadgen.read_accuracy_log(log, coco_set)


class Library:
    """Images that hold nothing but their position."""

    def batch(self, indices: Sequence[int]) -> torch.Tensor:
        return torch.tensor(indices, dtype=torch.float32).view(-1, 1, 1, 1)

    def random_batch(self, batch_size: int) -> torch.Tensor:
        return torch.zeros(batch_size, 1, 1, 1)


class Finder:
    """Finds one box in image n, of score n / 1000 and label 1, and waits while it is told to."""

    def __init__(self) -> None:
        self.anchors_cxcywh = torch.zeros(1, 4)
        self.batch_sizes: list[int] = []
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.started = threading.Semaphore(0)

    def detect(self, images: torch.Tensor) -> kernels.Detections:
        size = len(images)
        self.batch_sizes.append(size)
        self.started.release()
        self.may_go_on.wait()
        return kernels.Detections(
            boxes_ltrb=torch.tensor([0.1, 0.2, 0.3, 0.4]).expand(size, 2, 4),
            scores=images[:, 0, 0] / 1000 * torch.tensor([1, 0]),
            labels=torch.tensor([1, 0], dtype=torch.int32).expand(size, 2),
            counts=torch.ones(size, dtype=torch.int32),
        )


class Served:
    """A system under test, and what it answered: rows by query id."""

    def __init__(self, **options: int) -> None:
        self.finder = Finder()
        self.answers: list[tuple[int, np.ndarray]] = []
        self.errors: list[BaseException] = []
        self.system = loadgen.SystemUnderTest(
            self.finder,  # type: ignore[arg-type]
            Library(),  # type: ignore[arg-type]
            label_numbers=torch.tensor([0, 7]),
            complete=self.complete,
            on_error=self.errors.append,
            **options,
        )
        self.system.start([1])
        self.finder.batch_sizes.clear()
        while self.finder.started.acquire(blocking=False):
            pass

    def complete(self, answers: loadgen.Answers) -> None:
        for id_, rows, count in zip(answers.query_ids, answers.rows, answers.counts, strict=True):
            self.answers.append((id_, rows[:count].copy()))


def test_every_query_is_answered_once_with_its_own_rows() -> None:
    served = Served(largest_batch=5)

    def issue(first: int) -> None:
        for start in range(first, first + 300, 3):
            ids = range(start, start + 3)
            served.system.issue([*ids], [id_ % 500 for id_ in ids])

    issuers = [threading.Thread(target=issue, args=(first,)) for first in range(0, 1200, 300)]
    for issuer in issuers:
        issuer.start()
    for issuer in issuers:
        issuer.join()
    served.system.close()
    assert not served.errors
    assert sorted(id_ for id_, _ in served.answers) == list(range(1200))
    assert max(served.finder.batch_sizes) <= 5
    assert served.system.num_answered == 1200
    assert served.system.num_batches == len(served.finder.batch_sizes)
    for id_, rows in served.answers:
        np.testing.assert_allclose(rows, [[id_ % 500, 0.2, 0.1, 0.4, 0.3, id_ % 500 / 1000, 7]], rtol=1e-6)


def test_a_batch_is_what_came_while_the_one_before_was_computed() -> None:
    served = Served(largest_batch=4)
    served.finder.may_go_on.clear()
    served.system.issue([0], [0])
    served.finder.started.acquire()  # a lone query does not wait for others
    for id_ in range(1, 7):
        served.system.issue([id_], [id_])
    served.finder.may_go_on.set()
    served.system.close()
    assert served.finder.batch_sizes == [1, 4, 2]
    assert [id_ for id_, _ in served.answers] == list(range(7))


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
        timeout=120,
        env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"},
        check=False,
    )


def test_an_error_while_serving_ends_the_run_with_its_message(tmp_path: Path) -> None:
    changes = sets("benchmark.min_duration_s=600", "benchmark.server_batch_size=2")
    ended = run_apart(FAILING, "--config", DEMO, "--scenario", "Server", "--output", tmp_path, *changes)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == "RuntimeError: the device is gone"


def test_a_damaged_image_ends_the_run_with_its_name(synthetic_set: Path, weights: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "val2017").mkdir(parents=True)
    (data / "annotations").symlink_to(synthetic_set / "annotations")
    for image in (synthetic_set / "val2017").iterdir():
        content = image.read_bytes()
        start = content.index(b"\xff\xda")
        (data / "val2017" / image.name).write_bytes(content[:start] + b"\xff\xd9")
    ended = run_apart(
        "from ssd_fast.__main__ import main; main()",
        *("--config", DEMO, "--checkpoint", weights, "--data", data, "--scenario", "SingleStream"),
        *("--output", tmp_path / "logs", *sets("benchmark.min_duration_s=600")),
    )
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
            scenario="Offline",
            mode="accuracy",
            coco_set=coco_set,
            output=tmp_path,
            device=torch.device("cpu"),
        )


def test_without_loadgen_it_says_how_to_install_it(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status, _, err = run("--config", DEMO, "--scenario", "Offline", "--output", tmp_path, *sets())
    assert status == 1
    assert "pip install 'ssd_fast[loadgen]'" in err.splitlines()[-1]
