"""The page of a profile and its charts: whole, by themselves, and safe whatever names are in them."""

import re
import xml.etree.ElementTree as ET

import pytest
from made_up_profiles import FORMS, STEP_MS, WORK, make_profile, make_spans, make_stage
from readers import Page

from ssd_fast.profiling.charts import draw_charts
from ssd_fast.profiling.profile import BOTH, INPUT_ALONE, Finding, Operator
from ssd_fast.profiling.report import to_html


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
        ("CPU", ["steps", "timeline"]),
        ("ranks", ["steps", "timeline"]),
        ("step alone", ["steps"]),
        ("input alone", []),
        ("evaluation", []),
        ("nothing", []),
    ],
)
def test_charts_are_those_that_there_is_data_for(form: str, charts: list[str]) -> None:
    drawn = draw_charts(make_profile(**FORMS[form]))
    assert [chart.name for chart in drawn] == charts
    for chart in drawn:
        ET.fromstring(chart.svg)


def test_charts_say_what_was_measured() -> None:
    texts = {chart.name: Page(chart.svg).texts for chart in draw_charts(make_profile())}
    assert {"step alone: 100.0 ms", "input alone: 40.0 ms", *STEP_MS} <= set(texts["steps"])
    assert {"1", "2", "3"} <= set(texts["timeline"])


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
    profile = make_profile(
        stages=(),
        spans=make_spans(stage),
        recipe=evil,
        config={evil: {evil: evil}},
        findings=(Finding(name=evil, lost=0.1, sentence=evil),),
    ).model_copy(
        update={
            "stages": (stage, make_stage(INPUT_ALONE, {evil: 1.0}, 8)),
            "work": WORK.model_copy(update={"operators": (Operator(name=evil, seconds=1.0),)}),
        }
    )
    text = to_html(profile, before=make_profile(recipe="other"))
    page = Page(text)
    assert page.tags["script"] == 0
    assert "<script" not in text
    assert page.texts.count(evil) >= 5
    assert page.tags["svg"] == 2


def test_two_hundred_steps_stay_small_and_a_step_beyond_the_chart_is_told() -> None:
    profile = make_profile(gpus=1, steps=200, spread=0.2)
    stage = profile.stage(BOTH)
    assert stage is not None
    stage.samples["backward"][7] = 2.0
    text = to_html(profile)
    assert len(text.encode()) < 500_000
    assert "1 of 200 go on above the chart, the longest to 2,0" in text
