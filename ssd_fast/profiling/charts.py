"""Charts of a profile as SVG elements of a page. Uses matplotlib without pyplot, which would keep global state."""

import io
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, PathPatch
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from ssd_fast.parts import ALLREDUCE, BACKWARD, FORWARD, INPUT, LOSS, OPTIMIZER
from ssd_fast.profiling.profile import BOTH, INPUT_ALONE, REST, STEP_ALONE, Profile

_INK, _FAINT = "#222222", "#e6e6e6"
_LOOKS: dict[str, dict[str, Any]] = {
    INPUT: {"facecolor": "#f8ccd2", "edgecolor": "#d1495b", "hatch": "/////"},
    FORWARD: {"facecolor": "#2e6fb0"},
    LOSS: {"facecolor": "#8a5fb8"},
    BACKWARD: {"facecolor": "#2a8f5b"},
    ALLREDUCE: {"facecolor": "#e08e2b"},
    OPTIMIZER: {"facecolor": "#46b3c2"},
    REST: {"facecolor": "#b8b8b8"},
}
_OTHER_LOOK = {"facecolor": "#8c564b"}
_BATCH_LOOKS = ({"facecolor": "#b9a07a"}, {"facecolor": "#d8c7a8"})  # in turns, to tell batches apart
_MEDIANS = {STEP_ALONE: (0, (5, 2)), INPUT_ALONE: (0, (1, 1.5))}  # dashes of their lines
_WIDTH = 9.6
_RC: Any = {
    "font.size": 9,
    "hatch.linewidth": 0.6,
    "svg.fonttype": "none",  # text that can be searched, in the font of the page
    "svg.hashsalt": "ssd-fast",  # ids that depend only on what is drawn
    "text.parse_math": False,  # names may have dollar signs
}
_NO_METADATA: dict[str, Any] = dict.fromkeys(("Creator", "Date", "Format", "Type"))


class Chart(NamedTuple):
    """title, note: plain text; the note says how to read the chart. svg: an element whose ids begin with the name."""

    name: str
    title: str
    note: str
    svg: str


def draw_charts(profile: Profile) -> list[Chart]:
    """The charts for which the profile has data."""
    with matplotlib.rc_context(_RC):
        charts = (_draw_steps(profile), _draw_timeline(profile))
        return [chart for chart in charts if chart is not None]


def _draw_steps(profile: Profile) -> Chart | None:
    """A bar for each step: its parts on top of each other."""
    stage = profile.stage(BOTH) or profile.stage(STEP_ALONE)
    if stage is None or not any(stage.samples.values()):
        return None
    parts = {name: 1e3 * np.array(seconds) for name, seconds in stage.samples.items() if seconds}
    totals = np.sum(list(parts.values()), axis=0)
    medians = {alone.name: 1e3 * alone.whole.median_s for alone in profile.measured(*_MEDIANS)}
    figure = Figure(figsize=(_WIDTH, 3.4), layout="constrained")
    axes = figure.subplots()
    step = np.arange(1, len(totals) + 1)
    half = 0.5 if len(totals) > 80 else 0.42
    below = np.zeros(len(totals))
    for name, values in parts.items():
        _add_boxes(axes, step - half, step + half, below, below + values, _look(name))
        below = below + values
    for name, value in medians.items():
        axes.axhline(value, color="white", linewidth=3.2, alpha=0.75)
        axes.axhline(value, color=_INK, linewidth=1.5, linestyle=_MEDIANS[name])
    # A few steps that something held up would squeeze all others. They leave the chart; the note tells.
    top = min(max(totals), 2 * max(float(np.median(totals)), *medians.values(), 0))
    top = 1.06 * max(top, *medians.values(), 0)
    num_cut = int((totals > top).sum())
    axes.set_ylim(0, top)
    axes.set_xlim(1 - 0.6, len(totals) + 0.6)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _style(axes, grid="y")
    axes.set_xlabel("step", color=_INK)
    axes.set_ylabel("ms", color=_INK)
    lines = [
        Line2D([], [], color=_INK, linewidth=1.5, linestyle=_MEDIANS[name], label=f"{name}: {value:,.1f} ms")
        for name, value in medians.items()
    ]
    _add_legend(figure, parts, lines)
    note = "A bar for each step of rank 0, by its parts."
    if medians:
        note += " The lines are medians of a step or batch."
    if num_cut:
        note += f" {num_cut} of {len(totals)} go on above the chart, the longest to {max(totals):,.0f} ms."
    title = f"Every step of {stage.name}" if stage.name == BOTH else "Every step alone"
    return Chart("steps", title, note, _to_svg(figure, "steps"))


def _draw_timeline(profile: Profile) -> Chart | None:
    """A few steps of training; below them, the time that the input alone takes for as many batches."""
    if not profile.spans:
        return None
    parts: dict[str, list[tuple[float, float]]] = {}
    for span in profile.spans:
        parts.setdefault(span.part, []).append((1e3 * span.begin_s, 1e3 * span.end_s))
    num_steps = max(map(len, parts.values()))
    end_ms = max(end for times in parts.values() for _, end in times)
    alone = profile.stage(INPUT_ALONE)
    figure = Figure(figsize=(_WIDTH, 2.15 if alone else 1.7), layout="constrained")
    axes = figure.subplots()
    for name, times in parts.items():
        begin, end = np.array(times).T
        _add_boxes(axes, begin, end, np.full(len(begin), 0.62), np.full(len(begin), 1.38), _look(name))
    for begin_ms, _ in parts[profile.spans[0].part]:
        axes.plot([begin_ms, begin_ms], [0.55, 1.45], color=_INK, linewidth=0.9)
    lanes = {1.0: "training"}
    if alone is not None:
        lanes[0.0] = "input alone\nwould take"
        length = 1e3 * alone.whole.median_s
        for n in range(num_steps):
            left, right = np.array([n * length]), np.array([(n + 1) * length])
            _add_boxes(axes, left, right, np.array([-0.38]), np.array([0.38]), _BATCH_LOOKS[n % 2])
            if length > end_ms / 30:
                axes.text((n + 0.5) * length, 0, f"{n + 1}", ha="center", va="center", color=_INK, fontsize=8)
        end_ms = max(end_ms, num_steps * length)
    axes.set_yticks(list(lanes), list(lanes.values()))
    axes.set_ylim(-0.6 if alone else 0.4, 1.6)
    axes.set_xlim(-0.004 * end_ms, 1.004 * end_ms)
    _style(axes, grid="x")
    axes.set_xlabel("ms", color=_INK)
    axes.tick_params(axis="y", length=0)
    _add_legend(figure, parts)
    stage = BOTH if profile.stage(BOTH) else STEP_ALONE
    note = f"{num_steps} steps of {stage} on rank 0, one after another; a vertical line marks the begin of each."
    if alone:
        note += " Below, end to end, as many batches of the input alone (medians)."
    return Chart("timeline", "Input versus compute", note, _to_svg(figure, "timeline"))


def _add_boxes(
    axes: Axes, left: np.ndarray, right: np.ndarray, bottom: np.ndarray, top: np.ndarray, look: dict[str, Any]
) -> None:
    """Draw all rectangles of a part as one path: an element for each would make the page ten times as large."""
    seen = (right > left) & (top > bottom)
    if seen.any():
        corners = np.array([(left, bottom), (right, bottom), (right, top), (left, top)])[:, :, seen]
        path = Path.make_compound_path_from_polys(corners.transpose(2, 0, 1))
        axes.add_patch(PathPatch(path, linewidth=0, **look))


def _look(part: str) -> dict[str, Any]:
    return _LOOKS.get(part, _OTHER_LOOK)


def _add_legend(figure: Figure, parts: Iterable[str], lines: Sequence[Artist] = ()) -> None:
    """Place a legend above the chart: parts in one row, lines below them. matplotlib fills columns, not rows."""
    keys = [Patch(label=name, linewidth=0, **_look(name)) for name in parts]
    num_columns = max(len(keys), 1)
    handles: list[Artist] = [*keys, *lines]
    figure.legend(
        handles=[handle for column in range(num_columns) for handle in handles[column::num_columns]],
        loc="outside upper left",
        ncols=num_columns,
        frameon=False,
        handlelength=1.6,
        columnspacing=1.3,
    )


def _style(axes: Axes, *, grid: Any) -> None:
    """Set a light grid along the axis that shows milliseconds, and no frame."""
    axis = axes.xaxis if grid == "x" else axes.yaxis
    axis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.grid(axis=grid, color=_FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _to_svg(figure: Figure, name: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=_NO_METADATA)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]  # without the XML declaration, which HTML does not have
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
