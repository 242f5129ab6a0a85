"""The timeline of an evaluation has no gaps, and its report adds up."""

import re

import pytest
import torch
from timed_report import printed_seconds

from ssd_fast import timing
from ssd_fast.timing import Timeline, format_line, format_report


def test_regions_and_the_rest_add_up_to_what_the_clock_says(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (12.0, 12.5, 12.5, 13.5, 13.5, 13.75), (14.0, 14.25, 14.5, 16.5, 16.5, 16.625)
    times = iter([12.0, 12.0, *first, *second, 16.75, 17.0, 17.0, 18.0, 18.0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(times))
    timeline = Timeline(torch.device("cpu"), 10.0)
    timeline.settle("load")
    for _ in timeline.waits(range(2), "pre-processing"):
        for part in ("model", "decoding and NMS"):
            with timeline.region(part):
                pass
    timeline.settle("collecting")
    timeline.settle("scoring")
    assert timeline.parts() == {
        "load": [2.0],
        "pre-processing": [0.5, 0.25],  # the third time there was nothing to wait for
        "model": [1.0, 2.0],
        "decoding and NMS": [0.25, 0.125],
        "collecting": [0.875],
        "scoring": [1.0],
    }
    assert sum(map(sum, timeline.parts().values())) == 18.0 - 10.0
    assert timeline.intervals[3:5] == [("pre-processing", 4.0, 4.25), ("model", 4.5, 6.5)]


def test_what_is_printed_adds_up_and_percentiles_are_those_of_batches() -> None:
    laps = [0.0104 + 0.001 * place for place in range(100)]
    parts = {
        "load": [1.23449],
        "pre-processing": [0.00004] * 100,
        "model": laps,
        "decoding and NMS": [0.0002] * 100,
        "scoring": [0.00049],
    }
    report = format_report(parts, num_images=795, batch_size=8)
    seconds = printed_seconds(report)
    assert list(seconds) == [*parts, "total"]
    assert [seconds["load"], seconds["model"], seconds["scoring"]] == [1.234, 5.99, 0.0]
    assert seconds["total"] == round(sum(seconds[part] for part in parts), 3)
    (model,) = re.findall(r"^model .*?% +([\d.]+) +([\d.]+) +([\d.]+)$", report, re.MULTILINE)
    assert model == ("59.40", "99.40", "108.40")  # the 50th, 90th and 99th of 100
    (whole,) = re.findall(r"^pre-processing to decoding and NMS +([\d.]+) +([\d.]+) +([\d.]+)$", report, re.MULTILINE)
    assert whole == ("59.64", "99.64", "108.64")
    assert "795 images in 100 batches of 8" in report
    assert f"{795 / seconds['total']:.4g} images/s in all" in report


def test_the_line_of_a_folder_adds_up() -> None:
    line = format_line({"preparing": [0.004], "model": [0.204, 0.212], "drawing": [0.1049]}, num_images=3)
    assert line == "3 images in 0.52 s, 5.769 a second (model 0.42, drawing 0.10)"
