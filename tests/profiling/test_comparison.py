"""Two profiles side by side: ratios, and what only one of them has."""

import re

from made_up_profiles import INPUT_MS, STEP_MS, make_profile
from readers import line_of

from ssd_fast.profiling.profile import EVALUATION, INPUT_ALONE, STEP_ALONE
from ssd_fast.profiling.report import format_comparison


def test_comparison_has_ratios_in_images_per_second() -> None:
    before = make_profile()
    fast = {**STEP_MS, "backward": 75.0, "forward": 45.0}  # 130 ms, of twice the images
    after = make_profile(batch_size=16, step_ms=fast, input_ms=INPUT_MS, waiting_ms=0.0)
    text = format_comparison(before, after)
    assert line_of(text, "step alone") == "step alone 100.00 130.00 80 123.1 1.54x"
    assert line_of(text, "forward") == "forward 30.00 45.00 1.33x"
    assert line_of(text, "read") == "read 1.00 1.00 2.00x"
    together = text[text.index("both together") :]
    assert line_of(together, "waiting for input") == "waiting for input 1.50 0.00"
    assert line_of(text, "step alone, arithmetic") == "step alone, arithmetic 7.6 TFLOP/s 11.7 TFLOP/s 1.54x"
    assert line_of(text, "training.batch_size") == "training.batch_size: 8 -> 16"
    assert "precision" not in text
    assert line_of(text, "before: Bound") == "before: Bound by the arithmetic: it takes 90% of a step."


def test_comparison_names_what_only_one_has() -> None:
    before = make_profile(stages=(STEP_ALONE, EVALUATION), work=None)
    after = make_profile(
        gpus=1, stages=(INPUT_ALONE, STEP_ALONE), step_ms={**STEP_MS, "a new part": 1.0}, findings=(), config={}
    )
    text = format_comparison(before, after)
    assert line_of(text, "evaluation") == "evaluation 50.00 160 only before"
    assert line_of(text, "input alone") == "input alone 40.00 200 only after"
    assert line_of(text, "a new part") == "a new part 1.00 only after"
    assert line_of(text, "machine: device") == 'machine: device: "AMD EPYC 9B14, 2 cores" -> "NVIDIA H200"'
    assert line_of(text, "data.num_threads") == "data.num_threads: 0 -> missing"
    assert line_of(text, "after: ") == "after: no finding"


def test_nothing_differs_from_itself() -> None:
    text = format_comparison(make_profile(), make_profile())
    assert "settings that differ:\n  none" in text
    assert set(re.findall(r"\d+\.\d\dx", text)) == {"1.00x"}
