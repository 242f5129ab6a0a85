"""Charts of a profile as SVG, to stand in a page. Owner of matplotlib beside visualize; without pyplot, as there."""

import io
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, PathPatch
from matplotlib.path import Path
from matplotlib.ticker import EngFormatter, MaxNLocator, StrMethodFormatter

from ssd_fast.parts import ALLREDUCE, BACKWARD, FORWARD, INPUT, LOSS, OPTIMIZER
from ssd_fast.profiling.profile import BOTH, INPUT_ALONE, REST, STEP_ALONE, Profile

_INK, _GREY, _FAINT, _RED, _BLUE = "#222222", "#777777", "#e6e6e6", "#d1495b", "#2e6fb0"
_COLOURS = {
    INPUT: _RED,
    FORWARD: _BLUE,
    LOSS: "#8a5fb8",
    BACKWARD: "#2a8f5b",
    ALLREDUCE: "#e08e2b",
    OPTIMIZER: "#46b3c2",
    REST: "#b8b8b8",
}
_OTHER_COLOUR = "#8c564b"
_INPUT_COLOURS = ("#b9a07a", "#d8c7a8")  # in turns, so that batches are told apart
_WIDTH = 9.6
_NAME_LENGTH = 56  # of an operator: kernels' are endless
_RC: Any = {
    "font.size": 9,
    "hatch.linewidth": 0.6,
    "svg.fonttype": "none",  # text that can be searched, in the page's font
    "svg.hashsalt": "ssd-fast",  # ids that depend on what is drawn alone
    "text.parse_math": False,  # names may have dollar signs
}
_NO_METADATA: dict[str, Any] = dict.fromkeys(("Creator", "Date", "Format", "Type"))


class Chart(NamedTuple):
    """title, note: plain text, note says how to read it. svg: an element; its ids begin with the name."""

    name: str
    title: str
    note: str
    svg: str


class _Drawing(NamedTuple):
    title: str
    note: str
    figure: Figure


def draw_charts(profile: Profile) -> list[Chart]:
    """Those that there is data for."""
    charts = []
    with matplotlib.rc_context(_RC):
        for name, draw in _DRAWN.items():
            drawing = draw(profile)
            if drawing is not None:
                charts.append(Chart(name, drawing.title, drawing.note, _to_svg(drawing.figure, name)))
    return charts


def _steps(profile: Profile) -> _Drawing | None:
    """A bar per step, of its parts on top of each other."""
    stage = profile.stage(BOTH) or profile.stage(STEP_ALONE)
    if stage is None or not any(stage.samples.values()):
        return None
    parts = {part.name: 1e3 * np.array(stage.samples.get(part.name, [])) for part in stage.parts}
    parts = {name: values for name, values in parts.items() if len(values)}
    totals = np.sum(list(parts.values()), axis=0)
    lines = [
        (alone.name, 1e3 * alone.whole.median_s, style)
        for name, style in ((STEP_ALONE, (0, (5, 2))), (INPUT_ALONE, (0, (1, 1.5))))
        if (alone := profile.stage(name)) is not None
    ]
    figure = Figure(figsize=(_WIDTH, 3.4), layout="constrained")
    axes = figure.subplots()
    number = np.arange(1, len(totals) + 1)
    half = 0.5 if len(totals) > 80 else 0.42
    below = np.zeros(len(totals))
    for name, values in parts.items():
        _add_boxes(axes, number - half, number + half, below, below + values, name)
        below = below + values
    for _, value, style in lines:
        axes.axhline(value, color="white", linewidth=3.2, alpha=0.75)
        axes.axhline(value, color=_INK, linewidth=1.5, linestyle=style)
    # a few steps that something held up would squeeze all others: they leave the chart, which says so
    top = min(max(totals), 2 * max(float(np.median(totals)), *(value for _, value, _ in lines), 0))
    top = 1.06 * max(top, *(value for _, value, _ in lines), 0)
    cut = int((totals > top).sum())
    axes.set_ylim(0, top)
    axes.set_xlim(1 - 0.6, len(totals) + 0.6)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _style(axes, xlabel="step", ylabel="ms", grid="y")
    medians = [
        Line2D([], [], color=_INK, linewidth=1.5, linestyle=style, label=f"{name}: {value:,.1f} ms")
        for name, value, style in lines
    ]
    _legend(figure, _keys(parts), medians)
    note = "A bar per step of rank 0, by its parts."
    if lines:
        note += " The lines are medians, of a step or batch."
    if cut:
        note += f" {cut} of {len(totals)} go on above the chart, the longest to {max(totals):,.0f} ms."
    return _Drawing(f"Every step of {stage.name}" if stage.name == BOTH else "Every step alone", note, figure)


def _timeline(profile: Profile) -> _Drawing | None:
    """What training did, and below what the same batches take the input by itself."""
    if not profile.spans:
        return None
    alone = profile.stage(INPUT_ALONE)
    num_steps = max(Counter(span.part for span in profile.spans).values())
    figure = Figure(figsize=(_WIDTH, 2.15 if alone else 1.7), layout="constrained")
    axes = figure.subplots()
    parts: dict[str, list[tuple[float, float]]] = {}
    for span in profile.spans:
        parts.setdefault(span.part, []).append((1e3 * span.begin_s, 1e3 * span.end_s))
    for name, times in parts.items():
        begin, end = np.array(times).T
        _add_boxes(axes, begin, end, np.full(len(begin), 0.62), np.full(len(begin), 1.38), name)
    for begin_ms, _ in parts[profile.spans[0].part]:
        axes.plot([begin_ms, begin_ms], [0.55, 1.45], color=_INK, linewidth=0.9)
    end_ms = max(end for times in parts.values() for _, end in times)
    if alone is not None:
        length = 1e3 * alone.whole.median_s
        for n in range(num_steps):
            left, right = np.array([n * length]), np.array([(n + 1) * length])
            _add_boxes(axes, left, right, np.array([-0.38]), np.array([0.38]), "", _INPUT_COLOURS[n % 2])
            if length > end_ms / 30:
                axes.text((n + 0.5) * length, 0, f"{n + 1}", ha="center", va="center", color=_INK, fontsize=8)
        end_ms = max(end_ms, num_steps * length)
    lanes = {1.0: "training"} | ({0.0: "input alone\nwould take"} if alone else {})
    axes.set_yticks(list(lanes), list(lanes.values()))
    axes.set_ylim(-0.6 if alone else 0.4, 1.6)
    axes.set_xlim(-0.004 * end_ms, 1.004 * end_ms)
    _style(axes, xlabel="ms", ylabel="", grid="x")
    axes.tick_params(axis="y", length=0)
    _legend(figure, _keys(parts))
    stage = BOTH if profile.stage(BOTH) else STEP_ALONE
    note = f"{num_steps} steps of {stage} on rank 0, as they followed each other; an upright line begins each."
    if alone:
        note += " Below, end to end, as many batches as the input takes for them alone (medians)."
    return _Drawing("Input versus compute", note, figure)


def _roofline(profile: Profile) -> _Drawing | None:
    """Where a step stands between the copy rate and the matrix rate that were measured."""
    work, machine = profile.work, profile.machine
    stages = [stage for name in (STEP_ALONE, BOTH) if (stage := profile.stage(name)) is not None]
    if work is None or not stages or not work.bytes:
        return None
    peak, bandwidth = machine.matrix_flop_per_s, machine.copy_bytes_per_s
    ridge = peak / bandwidth
    flop = [work.train_flop * stage.images / machine.ranks for stage in stages]
    points = [(value / work.bytes, value / stage.whole.median_s) for stage, value in zip(stages, flop, strict=True)]
    left = min(0.3, *(x / 10 for x, _ in points))
    right = max(10 * ridge, *(10 * x for x, _ in points))
    figure = Figure(figsize=(_WIDTH, 3.9), layout="constrained")
    axes = figure.subplots()
    roof_x = np.array([left, ridge, right])
    roof_y = np.minimum(peak, bandwidth * roof_x)
    axes.fill_between(roof_x, roof_y, color="#f3f5f8", zorder=0)
    axes.plot(roof_x, roof_y, color=_INK, linewidth=2)
    axes.plot([ridge, ridge], [peak * 1e-9, peak], color=_GREY, linewidth=0.8, linestyle=":")
    bottom = min(bandwidth * left, *(y / 5 for _, y in points))
    axes.text(ridge, bottom * 1.25, f" {ridge:.3g} FLOP/byte", color=_GREY, ha="left", va="bottom")
    axes.text(right, 1.12 * peak, f"matrix rate, {EngFormatter('FLOP/s', places=1)(peak)} ", ha="right", va="bottom")
    middle = left**0.55 * ridge**0.45
    copy = axes.text(
        middle,
        bandwidth * middle * 1.12,
        f"copy, {EngFormatter('B/s', places=1)(bandwidth)}",
        ha="center",
        va="bottom",
        rotation_mode="anchor",
    )
    for n, (stage, (x, y)) in enumerate(zip(stages, points, strict=True)):
        roof = min(peak, bandwidth * x)
        rate = EngFormatter("FLOP/s", places=1)(y)
        colour = (_BLUE, _RED)[n]
        axes.plot([x, x], [y, roof], color=colour, linewidth=0.8, linestyle="--", alpha=0.6)
        axes.plot(
            [x],
            [y],
            "oD"[n],
            color=colour,
            fillstyle=("full", "none")[n],  # both are seen where they are one
            markersize=(7, 11)[n],
            linestyle="none",
            label=f"{stage.name}: {x:,.0f} FLOP/byte, {rate}, {y / roof:.0%} of the roof",
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, 3 * peak)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.yaxis.set_major_formatter(EngFormatter())
    _style(axes, xlabel="FLOP per byte that the operators read and write", ylabel="FLOP/s", grid="both")
    axes.minorticks_off()
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.01), ncols=2, frameon=False, borderaxespad=0)
    figure.draw_without_rendering()  # places the axes: then the slope on paper is known
    (x0, y0), (x1, y1) = axes.transData.transform([(left, bandwidth * left), (ridge, peak)])
    copy.set_rotation(float(np.degrees(np.arctan2(y1 - y0, x1 - x0))))
    note = (
        f"Of {_one(profile)}. The roof is what large copies (left) and large products of matrices (right) reach here."
    )
    return _Drawing("Roofline", note, figure)


def _input_parts(profile: Profile) -> _Drawing | None:
    stage = profile.stage(INPUT_ALONE)
    if stage is None or not stage.parts:
        return None
    whole = stage.whole.median_s
    note = f"Median ms of a batch; thin lines are quartiles. All together {1e3 * whole:,.1f} ms."
    figure = _level_bars(
        [part.name for part in stage.parts],
        [part.median_s for part in stage.parts],
        whole,
        quartiles=[(part.low_s, part.high_s) for part in stage.parts],
        colour=_INPUT_COLOURS[0],
    )
    return _Drawing("The input alone, by its parts", note, figure)


def _operators(profile: Profile) -> _Drawing | None:
    stage = profile.stage(BOTH) or profile.stage(STEP_ALONE)
    if profile.work is None or not profile.work.operators or stage is None:
        return None
    ranked = sorted(profile.work.operators, key=lambda item: -item.seconds)
    whole = stage.whole.median_s
    names = [_shortened(item.name) for item in ranked]
    figure = _level_bars(names, [item.seconds for item in ranked], whole, colour=_BLUE)
    note = f"Those that take longest, without what they call; shares are of a step, {1e3 * whole:,.1f} ms."
    return _Drawing("Kernels of a step" if profile.machine.is_gpu else "Operators of a step", note, figure)


_DRAWN: dict[str, Callable[[Profile], _Drawing | None]] = {
    "steps": _steps,
    "timeline": _timeline,
    "roofline": _roofline,
    "input": _input_parts,
    "operators": _operators,
}


def _level_bars(
    names: Sequence[str],
    seconds: Sequence[float],
    whole: float,
    *,
    colour: str,
    quartiles: Sequence[tuple[float, float]] = (),
) -> Figure:
    """Bars beside their names, from the top down, with their shares of the whole."""
    figure = Figure(figsize=(_WIDTH, 0.7 + 0.27 * len(names)), layout="constrained")
    axes = figure.subplots()
    rows, values = np.arange(len(names)), 1e3 * np.array(seconds)
    axes.barh(rows, values, height=0.72, color=colour)
    ends = values.copy()
    for row, (low, high) in enumerate(quartiles):
        axes.plot([1e3 * low, 1e3 * high], [row, row], color=_INK, linewidth=1.1)
        ends[row] = max(ends[row], 1e3 * high)
    longest = max(max(ends), 1e-9)
    for row, value in enumerate(values):
        text = f"{value:,.2f} ms, {value / (1e3 * whole):.1%}"
        axes.text(ends[row] + 0.008 * longest, row, text, va="center", color=_INK)
    axes.set_yticks(rows, [_shortened(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, 1.22 * longest)
    _style(axes, xlabel="ms", ylabel="", grid="x")
    axes.tick_params(axis="y", length=0)
    return figure


def _add_boxes(
    axes: Axes,
    left: np.ndarray,
    right: np.ndarray,
    bottom: np.ndarray,
    top: np.ndarray,
    name: str,
    colour: str | None = None,
) -> None:
    """All rectangles of a part as one path: an element for each would make the page ten times as large."""
    seen = (right > left) & (top > bottom)
    if seen.any():
        corners = np.array([(left, bottom), (right, bottom), (right, top), (left, top)])[:, :, seen]
        path = Path.make_compound_path_from_polys(corners.transpose(2, 0, 1))
        axes.add_patch(PathPatch(path, **(_look(name) if colour is None else {"facecolor": colour, "linewidth": 0})))


def _look(part: str) -> dict[str, Any]:
    colour = _COLOURS.get(part, _OTHER_COLOUR)
    if part == INPUT:
        return {"facecolor": "#f8ccd2", "edgecolor": colour, "hatch": "/////", "linewidth": 0}
    return {"facecolor": colour, "linewidth": 0}


def _keys(parts: Iterable[str]) -> list[Patch]:
    return [Patch(label=name, **_look(name)) for name in parts]


def _legend(figure: Figure, parts: Sequence[Artist], lines: Sequence[Artist] = ()) -> None:
    """Above the chart, parts in one row and lines below them; matplotlib fills columns, not rows."""
    num_columns = max(len(parts), 1)
    handles = [*parts, *lines]
    handles = [handle for column in range(num_columns) for handle in handles[column::num_columns]]
    figure.legend(
        handles=handles,
        loc="outside upper left",
        ncols=num_columns,
        frameon=False,
        handlelength=1.6,
        columnspacing=1.3,
    )


def _style(axes: Axes, *, xlabel: str, ylabel: str, grid: Any) -> None:
    for axis, label in ((axes.xaxis, xlabel), (axes.yaxis, ylabel)):
        if label == "ms":
            axis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.set_xlabel(xlabel, color=_INK)
    axes.set_ylabel(ylabel, color=_INK)
    axes.grid(axis=grid, color=_FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _one(profile: Profile) -> str:
    return "one GPU" if profile.machine.is_gpu else "one rank"


def _shortened(name: str) -> str:
    return name if len(name) <= _NAME_LENGTH else name[: _NAME_LENGTH - 1] + "…"


def _to_svg(figure: Figure, name: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=_NO_METADATA)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]  # without the XML declaration, which HTML has not
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
