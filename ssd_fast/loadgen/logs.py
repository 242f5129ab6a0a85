"""LoadGen's logs: the figures of a run, in numbers and as a table for people, and the detections of an accuracy run."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ssd_fast.config.sections import BenchmarkConfig
from ssd_fast.data.annotations import read_instances
from ssd_fast.data.boxes import ltrb_to_xywh
from ssd_fast.data.coco import CocoSet
from ssd_fast.data.policy import DataError
from ssd_fast.evaluation.coco_eval import CocoScores, DetectionTable
from ssd_fast.evaluation.detector import Detector
from ssd_fast.loadgen.settings import Mode, Scenario
from ssd_fast.tables import format_pairs

ACCURACY_LOG = "mlperf_log_accuracy.json"
DETAIL_LOG = "mlperf_log_detail.txt"
LOGS = (ACCURACY_LOG, DETAIL_LOG, "mlperf_log_summary.txt")

Pairs = list[tuple[str, str]]


class Measured(NamedTuple):
    """The result of a run.

    settings: those of the run.
    figures: LoadGen's own, by their keys in its detail log. Those of an accuracy run mean nothing.
    num_queries: number of images that were answered in the whole run. num_batches: batches in which they were computed.
    scores: COCO's numbers of the detections in the accuracy log; None without such a log.
    """

    scenario: Scenario
    mode: Mode
    settings: BenchmarkConfig
    figures: dict[str, Any]
    num_queries: int
    num_batches: int
    scores: CocoScores | None = None

    def is_valid(self) -> bool:
        """Return True if the run counts. LoadGen judges a performance run; an accuracy run always counts."""
        match self.mode:
            case "performance":
                return self.figures["result_validity"] == "VALID"
            case "find-load":
                return _highest_load(self.figures) is not None
            case "accuracy":
                return True


def label_numbers(detector: Detector, coco_set: CocoSet) -> Tensor:
    """Return [K + 1] int64: for label k, its category's position (from 1) in the annotation file, as MLPerf logs it."""
    categories = read_instances(coco_set.annotation_file).categories
    positions = {category.id: position for position, category in enumerate(categories, 1)}
    return torch.tensor([0, *(positions[id_] for id_ in detector.category_ids_in(coco_set).tolist())])


def read_accuracy_log(path: Path, coco_set: CocoSet) -> DetectionTable:
    """Return the detections in an accuracy log, in pixels. The first entry counts for an image that is logged twice.

    coco_set: the whole set of the run.
    Raises DataError for a log of another set and for an incomplete log.
    """
    images = coco_set.images
    category_ids = [category.id for category in read_instances(coco_set.annotation_file).categories]
    rows_of: dict[int, np.ndarray] = {}
    for entry in json.loads(path.read_bytes()):
        index = entry["qsl_idx"]
        rows = np.frombuffer(bytes.fromhex(entry["data"]), np.float32).reshape(-1, 7).astype(np.float64)
        if (rows[:, 0] != index).any():
            raise DataError(f"{path}: qsl_idx {index} has rows of another image")
        rows_of.setdefault(index, rows)
    if sorted(rows_of) != list(range(len(images.file_names))):
        raise DataError(
            f"{path}: holds {len(rows_of)} images: expected each of the {len(images.file_names)} of "
            f"{coco_set.annotation_file}"
        )
    found = np.concatenate([rows_of[index] for index in range(len(rows_of))])
    indices = found[:, 0].astype(np.int64)
    boxes_tlbr = found[:, 1:5] * images.sizes_hw[indices][:, [0, 1, 0, 1]]
    return DetectionTable(
        image_ids=images.image_ids[indices],
        boxes_xywh=ltrb_to_xywh(boxes_tlbr[:, [1, 0, 3, 2]]),
        scores=found[:, 5],
        category_ids=np.array(category_ids, np.int64)[found[:, 6].astype(np.int64) - 1],
    )


def read_figures(detail_log: Path) -> dict[str, Any]:
    """Return the last value of each key in LoadGen's detail log."""
    figures: dict[str, Any] = {}
    for line in detail_log.read_text("utf-8", "replace").splitlines():
        entry = json.loads(line.removeprefix(":::MLLOG "), strict=False)
        figures[entry["key"]] = entry["value"]
    return figures


def format_measured(measured: Measured) -> str:
    """Return a table of LoadGen's figures, with the reasons where a run is invalid."""
    figures, scenario, settings = measured.figures, measured.scenario, measured.settings
    pairs = [("scenario", f"{scenario}, LoadGen {str(figures.get('loadgen_version')).split()[0]}")]
    if measured.mode == "performance":
        pairs += [("result", figures["result_validity"]), *_metric(figures, scenario, settings)]
        pairs += [("invalid because", reason) for reason in _reasons(figures)]
    elif measured.mode == "find-load":
        pairs.append(("highest load", _describe_load(figures, settings)))
    mean_size = measured.num_queries / max(measured.num_batches, 1)
    pairs.append(("images", f"{measured.num_queries} in {measured.num_batches} batches, on average of {mean_size:.1f}"))
    if measured.mode == "performance" and scenario != Scenario.OFFLINE:
        pairs += _latencies(figures, scenario)
    return format_pairs(pairs)


def _metric(figures: dict[str, Any], scenario: Scenario, settings: BenchmarkConfig) -> Pairs:
    """Return the figures by which a scenario is judged."""
    match scenario:
        case Scenario.OFFLINE:
            return [("throughput", f"{figures['result_samples_per_second']:.4g} images/s")]
        case Scenario.SINGLE_STREAM:
            percentile = settings.single_stream_percentile
            latency = figures[f"result_{percentile}.00_percentile_latency_ns"]
            return [(f"p{percentile} of the latency", f"{latency / 1e6:.2f} ms")]
        case Scenario.MULTI_STREAM:
            percentile = settings.multi_stream_percentile
            latency = figures[f"result_{percentile}.00_percentile_per_query_latency_ns"]
            name = f"p{percentile} of the latency"
            return [(name, f"{latency / 1e6:.2f} ms for {settings.multi_stream_samples} images")]
        case Scenario.SERVER:
            percentile = settings.server_percentile
            latency = figures[f"result_{percentile}.00_percentile_latency_ns"]
            late, total = figures["result_overlatency_query_count"], figures["result_query_count"]
            return [
                (
                    "load",
                    f"{settings.server_qps:g} queries/s asked for, "
                    f"{figures['result_scheduled_samples_per_sec']:.2f} came, "
                    f"{figures['result_completed_samples_per_sec']:.2f} were answered",
                ),
                (
                    f"p{percentile} of the latency",
                    f"{latency / 1e6:.2f} ms, at most {settings.server_latency_ms:g} ms allowed; "
                    f"{late} of {total} queries took longer",
                ),
            ]


def _latencies(figures: dict[str, Any], scenario: Scenario) -> Pairs:
    kind = "per_query_latency_ns" if scenario == Scenario.MULTI_STREAM else "latency_ns"
    query = "query_" if scenario == Scenario.MULTI_STREAM else ""
    keys = {"min": f"result_min_{query}latency_ns", "mean": f"result_mean_{query}latency_ns"}
    keys |= {f"p{percentile}": f"result_{percentile}.00_percentile_{kind}" for percentile in (50, 90, 95, 97, 99)}
    keys["max"] = f"result_max_{query}latency_ns"
    return [(f"latency {name}", f"{figures[key] / 1e6:.2f} ms") for name, key in keys.items()]


def _reasons(figures: dict[str, Any]) -> list[str]:
    """Return what makes a run invalid, in LoadGen's words where it gives some."""
    early_stopping = figures.get("early_stopping_result", "").replace(" * ", " ")
    texts = {
        "result_perf_constraints_met": "the latency exceeds its bound",
        "result_min_duration_met": "it was shorter than benchmark.min_duration_s",
        "result_min_queries_met": "there were too few queries",
        "early_stopping_met": f"early stopping: {early_stopping}",
    }
    reasons = [text for key, text in texts.items() if figures.get(key) is False]
    if "error_runtime" in figures:
        reasons.append(figures["error_runtime"])
    return [" ".join(reason.split()) for reason in reasons]


def _describe_load(figures: dict[str, Any], settings: BenchmarkConfig) -> str:
    load = _highest_load(figures)
    if load is None:
        return f"not found: benchmark.server_qps = {settings.server_qps:g}, where the search starts, is too much"
    return f"{load:.0f} queries/s, by trials of {settings.min_duration_s:g} s each: a run must confirm it"


def _highest_load(figures: dict[str, Any]) -> float | None:
    """Return the load that --find-load found, queries per second, or None if even the first one was too high."""
    found = re.search(r"peak performance field: ([\d.]+)", str(figures.get("generic_message")))
    return float(found[1]) if found else None
