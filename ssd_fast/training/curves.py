"""The curves of a run: loss, learning rate, accuracy, and precision over recall.

Uses matplotlib without pyplot, so that no state is shared with others in the process.
"""

import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from ssd_fast.evaluation.fonts import font_families, warn_of_missing_letters
from ssd_fast.files import write_atomically
from ssd_fast.training.history import read_metrics

_INK, _GREY, _RED, _BLUE, _ORANGE, _GREEN = "#222222", "#777777", "#d1495b", "#2e6fb0", "#e08e2b", "#2a8f5b"
_NAMED_CLASSES = 10


def plot_curves(metrics_file: Path, output: Path) -> None:
    """Write a PNG of a run's loss, learning rate and accuracy over its steps.

    metrics_file: metrics.jsonl of ssd_fast.training.history; it may hold few records or none.
    """
    _save_figure(_curves_figure(read_metrics(metrics_file), source=str(metrics_file)), output)


def plot_precision_recall(precision_50: np.ndarray, class_names: Sequence[str], output: Path) -> None:
    """Write a PNG of precision over recall at IoU 0.50, of each class and of their mean.

    precision_50: [101, K], at recall 0, 0.01 ... 1; -1 for a class without ground truth (CocoScores.precision_50).
    class_names: K names.
    """
    warn_of_missing_letters(class_names)
    _save_figure(_precision_recall_figure(precision_50, class_names), output)


def _curves_figure(records: Sequence[Mapping[str, Any]], *, source: str) -> Figure:
    """Three panels: loss, learning rate, accuracy. source: name of the file in errors."""
    train = _columns(records, "train", ("epoch", "loss", "box_loss", "class_loss", "learning_rate"), source)
    evaluation = _columns(records, "eval", ("map", "map_50"), source)
    figure = Figure(figsize=(9, 9), dpi=100, layout="constrained")
    loss_axes, rate_axes, accuracy_axes = panels = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1.6, 2.4))

    for name, label, colour in (("loss", "total", _INK), ("class_loss", "class", _RED), ("box_loss", "box", _BLUE)):
        smooth = _smoothed(train[name])
        loss_axes.plot(train["step"], train[name], color=colour, alpha=0.25, linewidth=1)
        loss_axes.plot(train["step"], smooth, color=colour, linewidth=1.8, marker=_marker(smooth), label=label)
    _set_limits(loss_axes, _smoothed(train["loss"]))
    rate = train["learning_rate"]
    rate_axes.plot(train["step"], rate, color=_INK, linewidth=1.8, marker=_marker(rate))
    _set_limits(rate_axes, rate)
    for name, label, colour in (("map_50", "AP at IoU 0.50", _ORANGE), ("map", "mAP (IoU 0.50 to 0.95)", _GREEN)):
        values = np.where(evaluation[name] < 0, np.nan, evaluation[name])
        best = f", best {np.nanmax(values):.3f}" if np.isfinite(values).any() else ""
        accuracy_axes.plot(evaluation["step"], values, color=colour, linewidth=1.8, marker="o", label=label + best)
    _set_limits(accuracy_axes, evaluation["map_50"])

    for axes, columns, title, unit in (
        (loss_axes, train, "Loss (thin: as measured; thick: smoothed)", "loss, mean per image"),
        (rate_axes, train, "Learning rate", "learning rate"),
        (accuracy_axes, evaluation, "Accuracy on the validation images", "average precision, 0 to 1"),
    ):
        _style(axes, title=title, ylabel=unit)
        if len(columns["step"]) == 0:
            axes.text(0.5, 0.5, "nothing recorded yet", transform=axes.transAxes, ha="center", color=_GREY)
        elif axes is not rate_axes:
            axes.legend(frameon=False, ncols=3, fontsize=9, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)
    accuracy_axes.set_xlabel("step")
    accuracy_axes.set_xlim(0, 1.01 * max([1, *train["step"], *evaluation["step"]]))
    accuracy_axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    accuracy_axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    _mark_epochs(panels, train)
    return figure


def _columns(
    records: Sequence[Mapping[str, Any]], kind: str, keys: Sequence[str], source: str
) -> dict[str, np.ndarray]:
    """Columns of the records of a kind, float64, with one row per step (its last record); missing figures are NaN."""
    by_step = {record["step"]: record for record in records if record.get("kind") == kind}
    steps = sorted(by_step)
    columns = {"step": np.array(steps, np.float64)}
    for key in keys:
        values = [by_step[step].get(key) for step in steps]
        for step, value in zip(steps, values, strict=True):
            if not isinstance(value, int | float | None):
                raise ValueError(f"{source}: step {step}: {key} = {value!r}: expected a number")
        columns[key] = np.array([np.nan if value is None else value for value in values], np.float64)
    return columns


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Running mean of the finite values; the window is a fortieth of all values."""
    if len(values) == 0:
        return values
    window = np.ones(2 * (len(values) // 80) + 1)
    finite = np.isfinite(values)
    counts = np.convolve(finite, window, mode="same")
    sums = np.convolve(np.where(finite, values, 0), window, mode="same")
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _marker(values: np.ndarray) -> str:
    """The marker of a line: a line through a single point would be invisible without one."""
    return "o" if np.isfinite(values).sum() == 1 else ""


def _set_limits(axes: Axes, values: np.ndarray) -> None:
    """Limit the axis to 0 and just above the values; outliers of the unsmoothed values may leave it."""
    finite = values[np.isfinite(values)]
    axes.set_ylim(0, 1.1 * float(finite.max()) if len(finite) and finite.max() > 0 else 1)


def _style(axes: Axes, *, title: str, ylabel: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=_INK)
    axes.set_ylabel(ylabel, color=_INK)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _mark_epochs(panels: Sequence[Axes], train: Mapping[str, np.ndarray]) -> None:
    """Draw faint vertical lines at the ends of at most about ten epochs, with their numbers under the last panel."""
    known = np.isfinite(train["epoch"])
    epochs, steps = train["epoch"][known], train["step"][known]
    last = int(max(epochs, default=0))
    if last == 0:
        return
    stride = next(factor * 10**power for power in range(9) for factor in (1, 2, 5) if last <= 10 * factor * 10**power)
    marks = np.arange(stride, last + 1, stride)
    places = np.interp(marks, [0, *epochs], [0, *steps])
    for axes in panels:
        for place in places:
            axes.axvline(place, color="#d8d8d8", linewidth=0.8, linestyle=":", zorder=0)
    axis = panels[-1].secondary_xaxis(-0.26)
    axis.set_xticks(places, [f"{mark}" for mark in marks])
    axis.tick_params(length=0)
    axis.spines["bottom"].set_visible(False)
    axis.set_xlabel("end of epoch")


def _precision_recall_figure(precision_50: np.ndarray, class_names: Sequence[str]) -> Figure:
    """Classes as thin lines and their mean as a thick one. At most ten classes are named, the best and worst five."""
    if precision_50.shape != (101, len(class_names)):
        raise ValueError(f"precision_50 has shape {precision_50.shape}: expected (101, {len(class_names)})")
    recall = np.linspace(0, 1, 101)
    with_truth = np.flatnonzero((precision_50 > -1).all(axis=0))
    ap = precision_50.mean(axis=0)
    order = with_truth[np.argsort(-ap[with_truth], kind="stable")].tolist()
    half = _NAMED_CLASSES // 2
    named = order if len(order) <= _NAMED_CLASSES else order[:half] + order[-half:]

    figure = Figure(figsize=(9, 6), dpi=100, layout="constrained")
    axes = figure.subplots()
    handles, texts = [], []
    for k in order:
        if k not in named:
            (other,) = axes.plot(recall, precision_50[:, k], color="#cfcfcf", linewidth=0.7, zorder=1)
    colours = matplotlib.color_sequences["tab10"]
    for n, k in enumerate(named):
        handles += axes.plot(recall, precision_50[:, k], color=colours[n], linewidth=1.3, zorder=2)
        texts.append(f"{class_names[k]}  {ap[k]:.3f}")
    if len(named) < len(order):
        handles.insert(half, other)
        texts.insert(half, f"{len(order) - len(named)} classes between")
    if order:
        mean = precision_50[:, order].mean(axis=1)
        handles[:0] = axes.plot(recall, mean, color="black", linewidth=3, zorder=3)
        texts[:0] = [f"mean of {len(order)}  {mean.mean():.3f}"]
        texts = [text.replace("$", r"\$") for text in texts]
        prop = {"family": font_families(class_names)}
        figure.legend(
            handles, texts, title="class, AP at IoU 0.50", frameon=False, loc="outside right upper", prop=prop
        )
    else:
        axes.text(0.5, 0.5, "no class has ground truth", ha="center", color=_GREY)
    _style(axes, title="Precision over recall at IoU 0.50", ylabel="precision (share of detections that are right)")
    axes.set_xlabel("recall (share of objects that are found)")
    axes.set_xlim(0, 1.005)
    axes.set_ylim(0, 1.02)
    return figure


def _save_figure(figure: Figure, path: Path) -> None:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # which warn_of_missing_letters says better
        figure.savefig(buffer, format="png")
    write_atomically(path, buffer.getvalue())
