"""LoadGen's settings for this detector: those of MLPerf Inference v2.0, the last round that had it."""

import enum
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Literal

from ssd_fast.config.sections import BenchmarkConfig

Mode = Literal["performance", "accuracy", "find-load"]


class Scenario(enum.StrEnum):
    """The scenarios of MLPerf Inference, by LoadGen's names."""

    OFFLINE = "Offline"
    SINGLE_STREAM = "SingleStream"
    SERVER = "Server"
    MULTI_STREAM = "MultiStream"


_TEST_MODES = {"performance": "PerformanceOnly", "accuracy": "AccuracyOnly", "find-load": "FindPeakPerformance"}
_SEEDS = {
    "qsl_rng_seed": 6655344265603136530,
    "sample_index_rng_seed": 15863379492028895792,
    "schedule_rng_seed": 12662793979680847247,
}


def largest_batch(settings: BenchmarkConfig, scenario: Scenario) -> int:
    """Return the largest number of images that a scenario computes together."""
    return {
        Scenario.SINGLE_STREAM: 1,
        Scenario.MULTI_STREAM: settings.multi_stream_samples,
        Scenario.SERVER: settings.server_batch_size,
        Scenario.OFFLINE: settings.offline_batch_size,
    }[scenario]


def warm_up_sizes(settings: BenchmarkConfig, scenario: Scenario) -> Sequence[int]:
    """Return the batch sizes to warm up with. The last one is the most frequent size of the run.

    The list holds every size that the run will meet, except that of an incomplete last batch.
    """
    if scenario == Scenario.SERVER:
        return range(1, settings.server_batch_size + 1)
    if scenario == Scenario.OFFLINE:
        return (min(settings.offline_batch_size, settings.offline_min_samples),)
    return (largest_batch(settings, scenario),)


def make_settings(
    loadgen: ModuleType, settings: BenchmarkConfig, scenario: Scenario, mode: Mode, *, batch_seconds: float
) -> Any:
    """Return LoadGen's TestSettings.

    loadgen: the module mlperf_loadgen.
    batch_seconds: measured time of one batch of the scenario's usual size. LoadGen creates its queries in advance and
        needs to know how many there may be. SingleStream and MultiStream are told twice the number that the measured
        time allows, because LoadGen stops them by itself. Offline, where all queries are sent, is told 10% more.
    """
    made = loadgen.TestSettings()
    made.scenario = getattr(loadgen.TestScenario, scenario)
    made.mode = getattr(loadgen.TestMode, _TEST_MODES[mode])
    made.min_duration_ms = round(settings.min_duration_s * 1000)
    for name, seed in _SEEDS.items():
        setattr(made, name, seed)
    match scenario:
        case Scenario.SINGLE_STREAM:
            made.min_query_count = settings.single_stream_min_queries
            made.single_stream_expected_latency_ns = batch_seconds / 2 * 1e9
            made.single_stream_target_latency_percentile = settings.single_stream_percentile / 100
        case Scenario.MULTI_STREAM:
            made.min_query_count = settings.multi_stream_min_queries
            made.multi_stream_samples_per_query = settings.multi_stream_samples
            made.multi_stream_expected_latency_ns = batch_seconds / 2 * 1e9
            made.multi_stream_target_latency_percentile = settings.multi_stream_percentile / 100
        case Scenario.SERVER:
            made.min_query_count = settings.server_min_queries
            made.server_target_qps = settings.server_qps
            made.server_target_latency_ns = round(settings.server_latency_ms * 1e6)
            made.server_target_latency_percentile = settings.server_percentile / 100
            made.server_find_peak_qps_decimals_of_precision = 0
        case Scenario.OFFLINE:
            made.min_query_count = settings.offline_min_samples
            made.offline_expected_qps = (
                settings.offline_qps or 1.1 * warm_up_sizes(settings, scenario)[-1] / batch_seconds
            )
    return made
