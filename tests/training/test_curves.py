import json
import logging
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from PIL import Image

from ssd_fast.training import curves
from ssd_fast.training.curves import plot_curves, plot_precision_recall


def train_record(step: int, **more: Any) -> dict[str, Any]:
    losses = {"loss": 3.0 + 1 / step, "box_loss": 1.0, "class_loss": 2.0 + 1 / step}
    return {"kind": "train", "step": step, "epoch": step / 10, **losses, "learning_rate": 0.01, **more}


def eval_record(step: int, map_: float) -> dict[str, Any]:
    return {"kind": "eval", "step": step, "epoch": step // 10, "map": map_, "map_50": 2 * map_}


def write_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def lines_of(figure: Any, panel: int) -> list[Any]:
    """The curves of a panel, without the upright lines of epochs."""
    return [
        line for line in figure.axes[panel].get_lines() if len(set(line.get_xdata())) > 1 or line.get_marker() == "o"
    ]


def test_curves_show_every_figure_recorded() -> None:
    records = [train_record(step) for step in range(1, 101)] + [eval_record(50, 0.1), eval_record(100, 0.2)]
    figure: Any = curves._curves_figure(records, source="m")
    losses, rates, accuracies = (lines_of(figure, panel) for panel in range(3))
    assert (len(losses), len(rates), len(accuracies)) == (6, 1, 2)
    assert losses[0].get_ydata().tolist() == [record["loss"] for record in records[:100]]
    assert rates[0].get_ydata().tolist() == [0.01] * 100
    assert [line.get_ydata().tolist() for line in accuracies] == [[0.2, 0.4], [0.1, 0.2]]
    assert [text.get_text() for text in figure.axes[2].get_legend().get_texts()] == [
        "AP at IoU 0.50, best 0.400",
        "mAP (IoU 0.50 to 0.95), best 0.200",
    ]


@pytest.mark.parametrize(
    ("last_step", "marks"), [(9, []), (30, [1, 2, 3]), (100, list(range(1, 11))), (995, list(range(10, 91, 10)))]
)
def test_ends_of_epochs_are_marked_at_their_steps(last_step: int, marks: list[int]) -> None:
    figure = curves._curves_figure([train_record(step) for step in range(1, last_step + 1)], source="m")
    assert [axis.get_xlabel() for axis in figure.axes[2].child_axes] == ["end of epoch"] * bool(marks)
    for axis in figure.axes[2].child_axes:
        assert [text.get_text() for text in axis.get_xticklabels()] == [str(mark) for mark in marks]
        assert axis.get_xticks().tolist() == pytest.approx([10 * mark for mark in marks])


def test_smoothing_keeps_level_and_trend_and_bridges_what_is_missing() -> None:
    assert curves._smoothed(np.full(200, 3.0)) == pytest.approx(np.full(200, 3.0))
    ramp = np.arange(200.0)
    assert curves._smoothed(ramp)[5:-5] == pytest.approx(ramp[5:-5])
    ramp[100] = np.nan
    assert curves._smoothed(ramp)[100] == pytest.approx(100)
    noise = np.random.default_rng(0).normal(size=4000)
    assert curves._smoothed(noise).std() < 0.2 * noise.std()


def test_of_a_step_recorded_twice_the_last_counts_and_order_does_not_matter() -> None:
    records = [train_record(20), train_record(10), train_record(20, learning_rate=0.5)]
    (line,) = lines_of(curves._curves_figure(records, source="m"), 1)
    assert (line.get_xdata().tolist(), line.get_ydata().tolist()) == ([10, 20], [0.01, 0.5])


@pytest.mark.parametrize(
    "records",
    [
        [],
        [train_record(1)],
        [eval_record(10, 0.1)],
        [eval_record(10, -1.0)],
        [train_record(1, loss=None), train_record(2, loss=None, box_loss=None)],
        [train_record(1), eval_record(1, 0.0), {"kind": "other", "step": 1}],
    ],
    ids=["none", "one step", "evaluation only", "no ground truth", "not finite", "unknown kind"],
)
def test_few_records_still_give_a_image(records: list[dict[str, Any]], tmp_path: Path) -> None:
    plot_curves(write_lines(tmp_path / "metrics.jsonl", records), tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        image.load()
        assert (image.format, image.size) == ("PNG", (900, 900))


def test_a_single_step_is_visible() -> None:
    figure = curves._curves_figure([train_record(1)], source="m")
    assert all(line.get_marker() == "o" for line in lines_of(figure, 1))


def test_a_torn_line_is_left_out_by_file_and_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_lines(tmp_path / "metrics.jsonl", [train_record(1), train_record(2)])
    path.write_text(path.read_text() + '{"kind": "tra')
    with caplog.at_level(logging.WARNING):
        plot_curves(path, tmp_path / "curves.png")
    assert f"{path}, line 3" in caplog.text
    assert (tmp_path / "curves.png").exists()


def test_a_figure_that_is_no_number_is_named(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "metrics.jsonl", [train_record(1), train_record(2, loss="high")])
    with pytest.raises(ValueError, match=r"metrics\.jsonl: step 2: loss = 'high': expected a number"):
        plot_curves(path, tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def make_precision(num_classes: int) -> np.ndarray:
    """Class k keeps precision 1 up to recall (k + 1) / (K + 1); so later classes are better."""
    return (np.linspace(0, 1, 101)[:, None] < np.arange(1, num_classes + 1) / (num_classes + 1)).astype(np.float64)


def legend_of(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_precision_recall_names_few_classes_and_their_mean() -> None:
    precision = make_precision(3)
    figure: Any = curves._precision_recall_figure(precision, ["a", "_b", "$c$"])
    lines = figure.axes[0].get_lines()
    assert legend_of(figure) == ["mean of 3  0.495", r"\$c\$  0.743", "_b  0.495", "a  0.248"]
    mean = next(line for line in lines if line.get_color() == "black")
    assert mean.get_ydata().tolist() == precision.mean(axis=1).tolist()
    assert len(lines) == 4


def test_precision_recall_of_many_classes_names_the_best_and_the_worst() -> None:
    figure = curves._precision_recall_figure(make_precision(30), [f"class {k}" for k in range(30)])
    named = [text.rsplit("  ", 1)[0] for text in legend_of(figure)]
    best, worst = [f"class {k}" for k in (29, 28, 27, 26, 25)], [f"class {k}" for k in (4, 3, 2, 1, 0)]
    assert named == ["mean of 30", *best, "20 classes between", *worst]
    assert len(figure.axes[0].get_lines()) == 31


def test_classes_without_ground_truth_are_left_out_of_precision_recall(tmp_path: Path) -> None:
    precision = make_precision(3)
    precision[:, 1] = -1
    figure = curves._precision_recall_figure(precision, ["a", "b", "c"])
    assert legend_of(figure) == ["mean of 2  0.495", "c  0.743", "a  0.248"]
    plot_precision_recall(np.full((101, 2), -1.0), ["a", "b"], tmp_path / "pr.png")
    with Image.open(tmp_path / "pr.png") as image:
        image.load()
        assert (image.format, image.size) == ("PNG", (900, 600))


def test_precision_of_other_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"precision_50 has shape \(101, 3\): expected \(101, 2\)"):
        plot_precision_recall(make_precision(3), ["a", "b"], tmp_path / "pr.png")


def test_plots_leave_the_settings_of_matplotlib_alone(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    plot_precision_recall(make_precision(3), ["a", "b", "c"], tmp_path / "pr.png")
    assert dict(matplotlib.rcParams) == before
