"""The text of a profile: the figures in it, and its width."""

import re

import pytest
from made_up_profiles import INPUT_MS, make_profile, make_stage
from readers import Page, line_of

from ssd_fast.profiling.profile import INPUT_ALONE, Finding, Part
from ssd_fast.profiling.report import format_comparison, format_profile, to_html


def test_stages_and_parts_have_their_times_shares_and_rates() -> None:
    text = format_profile(make_profile())
    assert line_of(text, "AMD") == "AMD EPYC 9B14, 2 cores, 1 rank, torch 2.11.0, float32"
    assert line_of(text, "configs") == "configs/ssd300.toml, 8 images in a batch"
    assert line_of(text, "measured") == (
        "measured: matrix rate 15.2 TFLOP/s (in bfloat16 30.0 TFLOP/s), copy 80.0 GB/s, peak memory 6.25 GB"
    )
    assert line_of(text, "input alone") == "input alone 40.00 40.00 to 40.00 200 87%"
    assert line_of(text, "crop and decode") == "crop and decode 20.00 20.00 to 20.00 50.0%"
    assert line_of(text, "step alone") == "step alone 100.00 100.00 to 100.00 80 87%"
    assert line_of(text, "both together") == "both together 101.00 101.00 to 101.00 79.21 87%"
    assert line_of(text, "score") == "score 11.00 11.00 to 11.00 22.0%"


def test_quartiles_are_those_of_the_samples() -> None:
    stage = make_stage(INPUT_ALONE, {"read": 10.0}, 8)
    part = Part(name=INPUT_ALONE, median_s=0.01, low_s=0.0089, high_s=1.2345)
    text = format_profile(
        make_profile(stages=()).model_copy(update={"stages": (stage.model_copy(update={"whole": part}),)})
    )
    assert "10.00  8.90 to 1,234.50" in line_of(text, "input alone").replace(" 8.90", "  8.90")


def test_achieved_rates_are_shares_of_the_measured_ones() -> None:
    text = format_profile(make_profile())
    achieved = text[text.index("arithmetic") :]
    # 8 x 94.75 GFLOP in 0.1 s, of 15.16 TFLOP/s; 4 GB in 0.1 s, of 80 GB/s; the roof is the lower of the two
    assert line_of(achieved, "step alone") == "step alone 7.6 TFLOP/s 50.0% 40.0 GB/s 50.0% 189.5 50.0%"
    assert line_of(achieved, "both together") == "both together 7.5 TFLOP/s 49.5% 39.6 GB/s 49.5% 189.5 49.5%"
    assert "31.72 GFLOP forward and 94.75 GFLOP with backward per image" in text
    assert line_of(text, "with twice") == (
        "with twice the images in a batch: a step alone takes 160.00 ms, 100 images/s, 1.25x as many"
    )
    assert "99.0% of the slower of the two, step alone" in text


def test_several_ranks_share_the_work_and_are_listed() -> None:
    text = format_profile(make_profile(gpus=4, ranks=4))
    assert line_of(text, "NVIDIA") == "NVIDIA H200, 4 ranks, 16 cores each, torch 2.11.0, bfloat16"
    assert "8 images in a batch of a rank, 32 of all" in text
    assert "per GPU" in text
    assert line_of(text, "step alone") == "step alone 100.00 100.00 to 100.00 320 80 87%"
    achieved = text[text.index("arithmetic") :]
    assert line_of(achieved, "both together").startswith("both together 7.5 TFLOP/s 1.0% 39.6 GB/s 1.0% 189.5 1.0% 96%")
    assert line_of(text, "3 node0") == "3 node0 40.00 100.00 1.50 90.00 3.00"
    assert "per rank" in format_profile(make_profile(ranks=2))
    assert "per rank" not in format_profile(make_profile())


def test_of_many_ranks_the_terminal_lists_the_busiest_and_the_page_all() -> None:
    ranks = make_profile(gpus=4, ranks=64).ranks
    slow = ranks[41].model_copy(update={"compute_s": 0.2})
    profile = make_profile(gpus=4, ranks=64).model_copy(update={"ranks": (*ranks[:41], slow, *ranks[42:])})
    text = format_profile(profile)
    assert "64 ranks on 16 hosts" in text
    assert "the 16 of 64 ranks that need longest" in text
    assert len(re.findall(r"^ *\d+ node", text, re.MULTILINE)) == 16
    assert text.index("41 node10") < text.index("0 node0")
    assert {f"{n} node{n // 4}" for n in range(64)} <= set(Page(to_html(profile)).texts)


def test_findings_are_said_as_they_are() -> None:
    text = format_profile(make_profile())
    assert text.splitlines()[-2:] == [
        "Bound by the arithmetic: it takes 90% of a step.",
        "Also: the batch of 8 is small. Set training.batch_size = 16.",
    ]


@pytest.mark.parametrize("ranks", [1, 64])
def test_text_fits_110_columns(ranks: int) -> None:
    sentence = "Bound by " + "many words " * 40
    profile = make_profile(gpus=ranks, ranks=ranks, batch_size=1000, input_ms={"a part": 123456.7} | INPUT_MS)
    long = {"host": "a.very." + 20 * "long." + "name"}
    profile = profile.model_copy(
        update={
            "findings": (Finding(name="x", lost=0.5, sentence=sentence),),
            "recipe": "/a/path" * 30,
            "ranks": tuple(rank.model_copy(update=long) for rank in profile.ranks),
        }
    )
    other = make_profile(config={"a": {"b": list(range(200))}})
    for text in (format_profile(profile), format_comparison(profile, other)):
        assert max(map(len, text.splitlines())) <= 110
    assert "".join(sentence.split()) in "".join(format_profile(profile).split())


def test_operators_have_their_times_and_shares_of_a_step() -> None:
    text = format_profile(make_profile())
    assert line_of(text, "aten::operator_1 ") == "aten::operator_1 20.00 19.8%"  # of 101 ms
    assert "operators of a step" in text
    assert "kernels of a step" in format_profile(make_profile(gpus=1))
    assert {"Operators of a step", "aten::operator_1", "19.8%"} <= set(Page(to_html(make_profile())).texts)


def test_a_part_that_took_less_than_nothing_is_listed_as_what_was_measured() -> None:
    # parts of the input are differences between pipelines: noise can make a small one negative
    profile = make_profile(input_ms={"read": 10.0, "resize": -0.2})
    assert line_of(format_profile(profile), "resize") == "resize -0.20 -0.20 to -0.20 -2.0%"
    assert "-0.20" in Page(to_html(profile)).texts
