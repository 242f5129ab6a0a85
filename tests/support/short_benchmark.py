"""A benchmark small enough to be repeated in tests."""

from pathlib import Path

from repository import REPOSITORY
from tiny import TINY

from ssd_fast.data.coco import CocoSet, load_coco

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
"""Overrides of configs/demo.toml, beside those of TINY: a run of each scenario takes seconds."""
MANY = "detection.score_threshold=0.01"  # so that random weights detect something


def sets(*changes: str) -> list[str]:
    """Options of the command line that make a short benchmark of the demo's recipe."""
    return [part for change in (*TINY, *SHORT, *changes) for part in ("--set", change)]


def load_set(directory: Path) -> CocoSet:
    """The validation set of a folder in COCO's layout."""
    return load_coco(directory / "annotations" / "instances_val2017.json", directory / "val2017")
