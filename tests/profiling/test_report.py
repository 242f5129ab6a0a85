"""What is said of a profile that was made up: figures in text, the page by itself, two profiles side by side."""

import random
import re
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Mapping
from html.parser import HTMLParser
from typing import Any

import pytest

from ssd_fast.profiling import charts as profile_charts
from ssd_fast.profiling.profile import (
    BOTH,
    EVALUATION,
    INPUT_ALONE,
    STEP_ALONE,
    Finding,
    HostRead,
    Machine,
    Operator,
    Part,
    Profile,
    Rank,
    Span,
    Stage,
    Work,
)
from ssd_fast.profiling.report import compare_profiles, format_profile, to_html

INPUT_MS = {
    "read": 1.0,
    "crop and decode": 20.0,
    "resize": 9.0,
    "colour, normalise, flip": 6.0,
    "encode, hand over": 4.0,
}
STEP_MS = {
    "waiting for input": 0.5,
    "forward": 30.0,
    "loss": 2.0,
    "backward": 60.0,
    "allreduce": 3.0,
    "optimizer": 4.0,
    "the rest": 0.5,
}
EVALUATION_MS = {"pre-processing": 5.0, "model": 30.0, "decoding and NMS": 3.0, "collect": 1.0, "score": 11.0}
VOID = {"meta", "br"}


def make_stage(name: str, parts_ms: Mapping[str, float], images: float, *, steps: int = 3, spread: float = 0) -> Stage:
    """spread: share by which samples lie beside the medians, which are those given."""
    generator = random.Random(name)
    samples = {}
    for part, value in parts_ms.items():
        factors = [1 + spread * generator.uniform(-1, 1) for _ in range(steps)]
        middle = sorted(factors)[steps // 2]
        samples[part] = [value / 1e3 * factor / middle for factor in factors]
    return Stage(
        name=name,
        whole=Part.of(name, [sum(parts) for parts in zip(*samples.values(), strict=True)]),
        parts=tuple(Part.of(part, seconds) for part, seconds in samples.items()),
        images=images,
        busy=0.87,
        samples=samples,
    )


def make_spans(both: Stage, steps: int = 3) -> tuple[Span, ...]:
    spans, now = [], 0.0
    for n in range(steps):
        for part, seconds in both.samples.items():
            if part != "the rest":
                spans.append(Span(part=part, begin_s=now, end_s=now + seconds[n]))
            now += seconds[n]
    return tuple(spans)


def make_profile(
    *,
    gpus: int = 0,
    ranks: int = 1,
    batch_size: int = 8,
    input_ms: Mapping[str, float] = INPUT_MS,
    step_ms: Mapping[str, float] = STEP_MS,
    waiting_ms: float = 1.5,
    steps: int = 3,
    spread: float = 0,
    stages: tuple[str, ...] = (INPUT_ALONE, STEP_ALONE, BOTH, EVALUATION),
    with_work: bool = True,
    **changes: Any,
) -> Profile:
    """A step has 100 ms, together with its input 101 ms; 3 of them. changes: fields of a profile."""
    images = batch_size * ranks
    made = (
        make_stage(INPUT_ALONE, input_ms, images, spread=spread),
        make_stage(STEP_ALONE, step_ms, images, steps=steps, spread=spread),
        make_stage(BOTH, {**step_ms, "waiting for input": waiting_ms}, images, steps=steps, spread=spread),
        make_stage(EVALUATION, EVALUATION_MS, images),
    )
    work = Work(
        forward_flop=31.72e9,
        train_flop=94.75e9,
        bytes=4e9,
        parameter_bytes=80_000_000,
        host_reads=(HostRead(place="ssd_fast/training/step.py:61 train_step", times=2),),
        operators=tuple(Operator(name=f"aten::operator_{n}", seconds=0.04 / (n + 1)) for n in range(12)),
        gpu_busy=0.96 if gpus else None,
        layout_kernels=0.0 if gpus else None,
    )
    profile = Profile(
        machine=Machine(
            device="NVIDIA H200" if gpus else "AMD EPYC 9B14, 2 cores",
            is_gpu=bool(gpus),
            ranks=ranks,
            cores=16 if gpus else 2,
            torch="2.11.0",
            dtype="bfloat16" if gpus else "float32",
            matrix_flop_per_s=740e12 if gpus else 15.16e12,
            bf16_flop_per_s=740e12 if gpus else 30e12,
            copy_bytes_per_s=3.9e12 if gpus else 80e9,
            peak_bytes=6_250_000_000,
        ),
        config={"training": {"batch_size": batch_size, "precision": "auto"}, "data": {"num_threads": 0}},
        recipe="configs/ssd300.toml",
        batch_size=batch_size,
        stages=tuple(stage for stage in made if stage.name in stages),
        spans=make_spans(made[2]) if BOTH in stages else (),
        work=work if with_work else None,
        doubled={"forward": 0.05, "backward": 0.11} if STEP_ALONE in stages else {},
        ranks=tuple(
            Rank(host=f"node{n // 4}", input_s=0.04, step_s=0.1, compute_s=0.09, allreduce_s=0.003, waiting_s=0.0015)
            for n in range(ranks)
        ),
        findings=(
            Finding(name="arithmetic", lost=0.0, sentence="Bound by the arithmetic: it takes 90% of a step."),
            Finding(name="batch", lost=0.2, sentence="Also: the batch of 8 is small. Set training.batch_size = 16."),
        ),
    )
    return profile.model_copy(update=changes)


class Page(HTMLParser):
    """Reads a page strictly: every element is closed where it must be, no attribute comes twice."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: Counter[str] = Counter()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        names = [name for name, _ in attributes]
        assert len(set(names)) == len(names), f"{tag}: {names}"
        self.ids += [value or "" for name, value in attributes if name == "id"]
        self.links += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href", "action")]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.texts.append(data.strip())


def line_of(text: str, start: str) -> str:
    """The first line that begins so, but for its indent; blanks are single."""
    return next(" ".join(line.split()) for line in text.splitlines() if line.strip().startswith(start))


# ---- text ----


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
    # 8 x 94.75 GFLOP in 0.1 s, of 15.16 TFLOP/s; 4 GB in 0.1 s, of 80 GB/s
    assert line_of(achieved, "step alone") == "step alone 7.6 TFLOP/s 50.0% 40.0 GB/s 50.0%"
    assert line_of(achieved, "both together") == "both together 7.5 TFLOP/s 49.5% 39.6 GB/s 49.5%"
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
    assert line_of(achieved, "both together").startswith("both together 7.5 TFLOP/s 1.0% 39.6 GB/s 1.0% 96%")
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
    for text in (format_profile(profile), compare_profiles(profile, other)):
        assert max(map(len, text.splitlines())) <= 110
    assert "".join(sentence.split()) in "".join(format_profile(profile).split())


# ---- two profiles ----


def test_comparison_has_ratios_in_images_per_second() -> None:
    before = make_profile()
    fast = {**STEP_MS, "backward": 75.0, "forward": 45.0}  # 130 ms, of twice the images
    after = make_profile(batch_size=16, step_ms=fast, input_ms=INPUT_MS, waiting_ms=0.0)
    text = compare_profiles(before, after)
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
    before = make_profile(stages=(STEP_ALONE, EVALUATION), with_work=False)
    after = make_profile(
        gpus=1, stages=(INPUT_ALONE, STEP_ALONE), step_ms={**STEP_MS, "a new part": 1.0}, findings=(), config={}
    )
    text = compare_profiles(before, after)
    assert line_of(text, "evaluation") == "evaluation 50.00 160 only before"
    assert line_of(text, "input alone") == "input alone 40.00 200 only after"
    assert line_of(text, "a new part") == "a new part 1.00 only after"
    assert line_of(text, "machine: device") == 'machine: device: "AMD EPYC 9B14, 2 cores" -> "NVIDIA H200"'
    assert line_of(text, "data.num_threads") == "data.num_threads: 0 -> missing"
    assert line_of(text, "after: ") == "after: no finding"


def test_nothing_differs_from_itself() -> None:
    text = compare_profiles(make_profile(), make_profile())
    assert "settings that differ:\n  none" in text
    assert set(re.findall(r"\d+\.\d\dx", text)) == {"1.00x"}


# ---- the page ----

FORMS: dict[str, dict[str, Any]] = {
    "CPU": {},
    "GPU": {"gpus": 1},
    "ranks": {"gpus": 4, "ranks": 4},
    "step alone": {"stages": (STEP_ALONE,)},
    "input alone": {"stages": (INPUT_ALONE,), "with_work": False},
    "evaluation": {"stages": (EVALUATION,), "with_work": False, "findings": ()},
    "nothing": {"stages": (), "with_work": False, "findings": ()},
}


@pytest.mark.parametrize("form", FORMS)
def test_page_is_whole_and_needs_nothing_else(form: str) -> None:
    profile = make_profile(**FORMS[form])
    text = to_html(profile, before=make_profile() if form == "ranks" else None)
    page = Page(text)
    names = [stage.name for stage in profile.stages] + [part.name for stage in profile.stages for part in stage.parts]
    assert set(names) <= set(page.texts)
    assert (page.tags["h1"], page.tags["html"], page.tags["script"], page.tags["link"]) == (1, 1, 0, 0)
    assert len(set(page.ids)) == len(page.ids)
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert all(name in page.ids for name in re.findall(r"url\(#([^)]*)\)", text))
    without_namespaces = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    assert not re.search(r"https?:|src=|@import|url\((?!#)", without_namespaces)


@pytest.mark.parametrize(
    ("form", "charts"),
    [
        ("CPU", ["steps", "timeline", "roofline", "input", "operators"]),
        ("ranks", ["steps", "timeline", "roofline", "input", "operators"]),
        ("step alone", ["steps", "roofline", "operators"]),
        ("input alone", ["input"]),
        ("evaluation", []),
        ("nothing", []),
    ],
)
def test_charts_are_those_that_there_is_data_for(form: str, charts: list[str]) -> None:
    drawn = profile_charts.draw_charts(make_profile(**FORMS[form]))
    assert [chart.name for chart in drawn] == charts
    for chart in drawn:
        ET.fromstring(chart.svg)


def test_charts_say_what_was_measured() -> None:
    texts = {chart.name: Page(chart.svg).texts for chart in profile_charts.draw_charts(make_profile())}
    assert {"step alone: 100.0 ms", "input alone: 40.0 ms", *STEP_MS} <= set(texts["steps"])
    # 758 GFLOP on 4 GB, where the bend is at 15.16 TFLOP/s / 80 GB/s
    assert "step alone: 190 FLOP/byte, 7.6 TFLOP/s, 50% of the roof" in texts["roofline"]
    assert {"190 FLOP/byte", "matrix rate, 15.2 TFLOP/s", "copy, 80.0 GB/s"} <= set(texts["roofline"])
    assert {"1", "2", "3"} <= set(texts["timeline"])
    assert "20.00 ms, 50.0%" in texts["input"]
    assert {"aten::operator_0", "20.00 ms, 19.8%"} <= set(texts["operators"])  # of 101 ms


def test_the_sentence_is_the_headline() -> None:
    texts = Page(to_html(make_profile())).texts
    headline = texts.index("Bound by the arithmetic: it takes 90% of a step.")
    assert (
        headline < texts.index("Also: the batch of 8 is small. Set training.batch_size = 16.") < texts.index("Stages")
    )


def test_page_compares() -> None:
    after = make_profile(batch_size=16)
    texts = Page(to_html(after, before=make_profile())).texts
    assert {"training.batch_size", "2.00x", "Before and after"} <= set(texts)
    assert "Before and after" not in Page(to_html(after)).texts


def test_names_are_text_wherever_they_come_from() -> None:
    evil = "<script>alert('$x$')</script>&\"id=\"x"
    stage = make_stage(BOTH, {evil: 1.0, "forward": 2.0}, 8)
    work = make_profile().work
    assert work is not None
    profile = make_profile(
        stages=(),
        spans=make_spans(stage),
        recipe=evil,
        config={evil: {evil: evil}},
        findings=(Finding(name=evil, lost=0.1, sentence=evil),),
    ).model_copy(
        update={
            "stages": (stage, make_stage(INPUT_ALONE, {evil: 1.0}, 8)),
            "work": work.model_copy(update={"operators": (Operator(name=evil, seconds=1.0),)}),
        }
    )
    text = to_html(profile, before=make_profile(recipe="other"))
    page = Page(text)
    assert page.tags["script"] == 0
    assert "<script" not in text
    assert page.texts.count(evil) >= 5
    assert page.tags["svg"] == 5


def test_two_hundred_steps_stay_small_and_a_step_beyond_the_chart_is_told() -> None:
    profile = make_profile(gpus=1, steps=200, spread=0.2)
    stage = profile.stage(BOTH)
    assert stage is not None
    stage.samples["backward"][7] = 2.0
    text = to_html(profile)
    assert len(text.encode()) < 500_000
    assert "1 of 200 go on above the chart, the longest to 2,0" in text


def test_a_part_that_took_less_than_nothing_is_drawn_as_what_was_measured() -> None:
    # parts of the input are differences between pipelines: noise can make a small one negative
    profile = make_profile(input_ms={"read": 10.0, "resize": -0.2})
    assert line_of(format_profile(profile), "resize") == "resize -0.20 -0.20 to -0.20 -2.0%"
    assert "-0.20 ms" in "".join(Page(to_html(profile)).texts)
