"""metrics.jsonl and TensorBoard hold one history of a run."""

import json
import logging
import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer
from torch.utils.tensorboard import SummaryWriter

from ssd_fast.training.folder import RunFolder
from ssd_fast.training.history import MetricsWriter, read_metrics

SCORE_NAMES = [
    "map",
    "map_50",
    "map_75",
    "map_small",
    "map_medium",
    "map_large",
    "mar_1",
    "mar_10",
    "mar_100",
    "mar_small",
    "mar_medium",
    "mar_large",
]


@pytest.fixture(autouse=True)
def few_writers(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard reads event files by name; of one second, the tenth of a process would come before the ninth."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


@contextmanager
def open_writer(
    directory: Path, resume_step: int | None = None, scored_epochs: Sequence[int] = (1, 2, 3)
) -> Iterator[MetricsWriter]:
    writer = MetricsWriter(RunFolder(directory), resume_step=resume_step, scored_epochs=scored_epochs)
    yield writer
    writer.close()


def train(writer: MetricsWriter, *steps: int, loss: float = 3.0) -> None:
    for step in steps:
        writer.train(step, step / 10, loss, 1.0, loss - 1.0, 0.0125, 812.5)


def lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def scalars(directory: Path, tag: str) -> dict[int, float]:
    events = EventAccumulator(str(directory / "tensorboard"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


def test_lines_hold_every_figure_under_its_name(tmp_path: Path) -> None:
    scores = {name: number / 16 for number, name in enumerate(SCORE_NAMES)}
    with open_writer(tmp_path) as writer:
        writer.train(20, 1.25, 3.0, 1.0, 2.0, 0.0125, 812.5)
        writer.evaluation(32, 2, scores)
    assert lines(tmp_path) == [
        {
            "kind": "train",
            "step": 20,
            "epoch": 1.25,
            "loss": 3.0,
            "box_loss": 1.0,
            "class_loss": 2.0,
            "learning_rate": 0.0125,
            "images_per_second": 812.5,
        },
        {"kind": "eval", "step": 32, "epoch": 2, **scores},
    ]
    assert read_metrics(tmp_path / "metrics.jsonl") == lines(tmp_path)


def test_tensorboard_holds_the_same_figures(tmp_path: Path) -> None:
    with open_writer(tmp_path) as writer:
        writer.train(20, 1.25, 3.0, 1.0, 2.0, 0.0125, 812.5)
        writer.evaluation(32, 2, dict.fromkeys(SCORE_NAMES, 0.25))
    expected = {
        "loss/total": 3.0,
        "loss/box": 1.0,
        "loss/class": 2.0,
        "learning_rate": 0.0125,
        "images_per_second": 812.5,
    }
    for tag, value in expected.items():
        assert scalars(tmp_path, tag) == {20: pytest.approx(value)}
    for name in SCORE_NAMES:
        assert scalars(tmp_path, f"eval/{name}") == {32: 0.25}


def test_a_line_is_on_disk_before_the_run_ends(tmp_path: Path) -> None:
    with open_writer(tmp_path) as writer:
        train(writer, 1)
        assert [line["step"] for line in lines(tmp_path)] == [1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_figures_that_are_not_finite_are_null(tmp_path: Path, bad: float) -> None:
    with open_writer(tmp_path) as writer:
        writer.train(1, 0.1, bad, 1.0, bad, 0.0125, 812.5)
        writer.evaluation(1, 1, {"map": bad})

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    parsed = [json.loads(line, parse_constant=refuse) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert (parsed[0]["loss"], parsed[0]["box_loss"], parsed[0]["class_loss"]) == (None, 1.0, None)
    assert parsed[1]["map"] is None


def test_resumed_run_leaves_one_history(tmp_path: Path) -> None:
    with open_writer(tmp_path) as writer:
        train(writer, 10, 20, 30, 40, loss=3.0)
        writer.evaluation(40, 4, {"map": 0.1})
    with open_writer(tmp_path, resume_step=20) as writer:
        train(writer, 30, loss=5.0)
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(10, 3.0), (20, 3.0), (30, 5.0)]
    assert scalars(tmp_path, "loss/total") == {10: 3.0, 20: 3.0, 30: 5.0}


def test_new_run_in_the_same_folder_starts_empty(tmp_path: Path) -> None:
    with open_writer(tmp_path) as writer:
        train(writer, 10, 20)
    with open_writer(tmp_path) as writer:
        train(writer, 5)
    assert [line["step"] for line in lines(tmp_path)] == [5]
    assert list(scalars(tmp_path, "loss/total")) == [5]


def test_run_resumes_over_a_torn_last_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with open_writer(tmp_path) as writer:
        train(writer, 10, 20)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-15])
    with caplog.at_level(logging.WARNING), open_writer(tmp_path, resume_step=20) as writer:
        train(writer, 30)
    assert [line["step"] for line in lines(tmp_path)] == [10, 30]
    assert "metrics.jsonl, line 2" in caplog.text


@pytest.mark.parametrize("line", [b"[1]", b"{}", b'{"step": "x"}', b"\xff\xfe", b"3", b""])
def test_lines_that_are_no_records_are_left_out(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n')
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]


def test_history_can_be_resumed_where_none_was_written(tmp_path: Path) -> None:
    with open_writer(tmp_path, resume_step=7) as writer:
        train(writer, 8)
    assert [line["step"] for line in lines(tmp_path)] == [8]


def test_failed_rewrite_leaves_the_earlier_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_writer(tmp_path) as writer:
        train(writer, 10, 20)
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match=r"No space.*metrics\.jsonl"):
        MetricsWriter(RunFolder(tmp_path), resume_step=10, scored_epochs=())
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))


def test_full_disk_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    with mock.patch("torch.utils.tensorboard.SummaryWriter"):
        writer = MetricsWriter(RunFolder(tmp_path), resume_step=None, scored_epochs=())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # a file may not grow past 100 bytes
    try:
        with pytest.raises(OSError, match=r"metrics\.jsonl"):
            train(writer, 1)  # a part of whose line is written
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        writer.close()


def test_errors_of_tensorboard_name_its_folder(tmp_path: Path) -> None:
    with (
        open_writer(tmp_path) as writer,
        mock.patch.object(SummaryWriter, "add_scalar", side_effect=OSError(28, "No space left on device")),
        pytest.raises(OSError, match=r"No space.*tensorboard"),
    ):
        train(writer, 1)
