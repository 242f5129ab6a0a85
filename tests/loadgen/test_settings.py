"""LoadGen's settings for each scenario."""

from typing import Any

import pytest
from repository import REPOSITORY

from ssd_fast.config.recipe import load_config
from ssd_fast.loadgen.settings import Scenario, make_settings

mlperf_loadgen = pytest.importorskip("mlperf_loadgen")


def test_settings_are_those_of_the_last_round_with_this_detector() -> None:
    settings = load_config(REPOSITORY / "configs" / "ssd1200.toml").benchmark
    made: dict[str, Any] = {
        scenario: make_settings(mlperf_loadgen, settings, scenario, "performance", batch_seconds=0.1)
        for scenario in Scenario
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
