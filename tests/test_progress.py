"""Progress is a live display on a terminal and plain dated lines elsewhere."""

import errno
import io
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from repository import REPOSITORY
from rich.console import Console

from ssd_fast.progress import Progress, setup_logging, track

DATE = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"
FIGURES = {"loss": 5.432, "box_loss": 1.234, "class_loss": 4.198, "learning_rate": 0.0125, "images_per_second": 812.34}


class Clock:
    """A clock that only moves when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def pipe() -> Console:
    return Console(file=io.StringIO(), width=80)


def terminal(width: int = 80) -> Console:
    return Console(file=io.StringIO(), width=width, height=24, force_terminal=True, _environ={"TERM": "xterm"})


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture
def log_lines(tmp_path: Path) -> Iterator[Callable[[], list[str]]]:
    """Logging as a command sets it up, with a file; gives the file's lines so far."""
    setup_logging(tmp_path / "train.log")
    yield lambda: (tmp_path / "train.log").read_text().splitlines()
    setup_logging(None)


def undated(lines: list[str]) -> list[str]:
    assert all(re.match(DATE + " ", line) for line in lines)
    return [line[20:] for line in lines]


def train_two_epochs(progress: Progress, clock: Clock) -> None:
    for epoch in (1, 2):
        progress.start_epoch(epoch, 100)
        for step in (40, 80, 100):
            clock.now += 5
            progress.update(step, **FIGURES)


@pytest.mark.parametrize("make_console", [pipe, terminal])
def test_every_update_is_a_dated_line_of_the_log_file(
    make_console: Callable[[], Console], log_lines: Callable[[], list[str]]
) -> None:
    clock = Clock()
    with Progress(epochs=3, console=make_console(), clock=clock) as progress:
        progress.start_epoch(3, 3665, start_step=80)
        clock.now += 10
        progress.update(120, **FIGURES)
        progress.evaluation(3, 0.2134, 0.3911, seconds=75.2)
        logging.getLogger("ssd_fast").info("a checkpoint [step 120] was written")
        logging.getLogger("ssd_fast").warning("loss is not finite")
    assert undated(log_lines()) == [
        "epoch 3/3 step 120/3665 loss 5.432 (box 1.234 class 4.198) lr 0.0125 812.3 images/s ETA 0:14:46",
        "epoch 3/3 mAP 0.2134 AP50 0.3911, took 0:01:15",
        "a checkpoint [step 120] was written",
        "warning: loss is not finite",
    ]


def test_remaining_time_covers_the_run_and_follows_the_recent_speed(log_lines: Callable[[], list[str]]) -> None:
    clock = Clock()
    progress = Progress(epochs=2, console=pipe(), clock=clock)
    progress.start_epoch(1, 1000)
    for step, seconds in ((100, 100.0), (200, 100.0), (300, 200.0), (301, 2.0)):
        clock.now += seconds
        progress.update(step, **FIGURES)
    clock.now += 5000  # an evaluation is not the time of a step
    progress.start_epoch(2, 1000)
    progress.update(0, **FIGURES)
    first, second, third, fourth, fifth = (line.split("ETA ")[1] for line in log_lines())
    assert first == "0:31:40"  # 1900 steps of 1 s
    assert second == "0:30:00"  # 1800 steps of 1 s
    assert 1700 * 1.3 < seconds_of(third) < 1700 * 1.5  # between 1 s and 2 s
    assert seconds_of(fourth) == pytest.approx(seconds_of(third), rel=0.01)  # one step weighs little
    assert seconds_of(fifth) == pytest.approx(seconds_of(fourth) / 1699 * 1000, abs=1.0)


def seconds_of(text: str) -> int:
    hours, minutes, seconds = text.split(":")
    return int(hours) * 3600 + int(minutes) * 60 + int(seconds)


def test_times_beyond_a_day_stay_in_hours(log_lines: Callable[[], list[str]]) -> None:
    clock = Clock()
    progress = Progress(epochs=1, console=pipe(), clock=clock)
    progress.start_epoch(1, 101)
    clock.now += 3661.4
    progress.update(1, **FIGURES)
    assert log_lines()[0].endswith("ETA 101:42:20")


def test_nothing_is_drawn_in_a_pipe(log_lines: Callable[[], list[str]]) -> None:
    console, clock = pipe(), Clock()
    with Progress(epochs=2, console=console, clock=clock) as progress:
        train_two_epochs(progress, clock)
        assert list(track(range(3), "evaluating", console=console)) == [0, 1, 2]
    assert written(console) == ""
    assert len(log_lines()) == 7


@pytest.mark.parametrize("width", [40, 60, 80, 200])
@pytest.mark.parametrize("loss", [5.432, 123456.789, float("nan")])
def test_live_display_is_three_lines_that_fit(width: int, loss: float) -> None:
    console, clock = terminal(width), Clock()
    progress = Progress(epochs=80, console=console, clock=clock)
    progress.start_epoch(79, 117266)
    clock.now += 86400
    progress.update(1234, **{**FIGURES, "loss": loss, "learning_rate": 6.25e-05})
    progress.evaluation(78, 0.2134, 0.3911, seconds=75.2)
    lines = console.render_lines(progress, pad=False)
    assert len(lines) == 3
    assert all(sum(segment.cell_length for segment in line) <= width for line in lines)


def test_live_display_at_80_columns_shows_every_figure_in_full() -> None:
    console, clock = terminal(80), Clock()
    progress = Progress(epochs=80, console=console, clock=clock)
    progress.start_epoch(34, 3665)
    clock.now += 100
    progress.update(1200, **FIGURES)
    progress.evaluation(33, 0.2134, 0.3911, seconds=75.2)
    lines = ["".join(segment.text for segment in line) for line in console.render_lines(progress, pad=False)]
    assert re.fullmatch(r"epoch 34/80 [━╸╺ ]+ 1200/3665 ETA 0:03:25 *", lines[0])
    assert lines[1].rstrip() == "loss 5.432 (box 1.234 class 4.198)   lr 0.0125   812.3 images/s"
    assert lines[2].rstrip() == "whole run ETA 3:57:35   mAP 0.2134 AP50 0.3911 after epoch 33"


def test_live_display_before_the_first_epoch_and_update() -> None:
    console = terminal()
    progress = Progress(epochs=80, console=console)
    assert "preparing" in str(console.render_lines(progress))
    progress.start_epoch(1, 10)
    assert "0/10" in str(console.render_lines(progress))


def test_terminal_gets_the_display_and_its_cursor_back() -> None:
    console, clock = terminal(), Clock()
    with Progress(epochs=2, console=console, clock=clock) as progress:
        train_two_epochs(progress, clock)
    assert "812.3 images/s" in written(console)
    assert written(console).rindex(SHOW_CURSOR) > written(console).rindex(HIDE_CURSOR)


def test_interrupt_leaves_a_clean_terminal() -> None:
    console, clock = terminal(), Clock()

    def interrupted() -> Iterator[int]:
        yield 1
        raise KeyboardInterrupt

    def train_and_evaluate() -> None:
        with Progress(epochs=2, console=console, clock=clock) as progress:
            train_two_epochs(progress, clock)
            list(track(interrupted(), "evaluating", 5, console=console))

    with pytest.raises(KeyboardInterrupt):
        train_and_evaluate()
    assert written(console).rindex(SHOW_CURSOR) > written(console).rindex(HIDE_CURSOR)
    with Progress(epochs=1, console=console):  # the console is free for the next display
        pass


def test_track_reports_every_half_minute_and_at_the_end(log_lines: Callable[[], list[str]]) -> None:
    clock = Clock()
    items = []
    for item in track([10, 20, 30, 40], "evaluating", console=pipe(), clock=clock):
        items.append(item)
        clock.now += 20
    assert items == [10, 20, 30, 40]
    assert undated(log_lines()) == [
        "evaluating 2/4 (50%)",
        "evaluating 4/4 (100%)",
        "evaluating 4/4 (100%), took 0:01:20",
    ]


def test_track_counts_items_of_unknown_number(log_lines: Callable[[], list[str]]) -> None:
    for console in (pipe(), terminal()):
        assert list(track(iter("abc"), "reading", console=console, clock=Clock())) == ["a", "b", "c"]
    assert undated(log_lines()) == ["reading 3, took 0.0 s"] * 2
    assert list(track([], "reading", console=pipe(), clock=Clock())) == []


def test_track_passes_errors_on_without_a_last_line(log_lines: Callable[[], list[str]]) -> None:
    def fail(item: int) -> int:
        raise ValueError(f"item {item} is bad")

    with pytest.raises(ValueError, match="item 0 is bad"):
        list(track(map(fail, range(3)), "reading", 3, console=pipe()))
    assert log_lines() == []


def test_second_setup_replaces_the_first(tmp_path: Path) -> None:
    setup_logging(tmp_path / "a.log")
    setup_logging(tmp_path / "b.log")
    logging.getLogger("ssd_fast").info("once")
    setup_logging(None)
    logging.getLogger("ssd_fast").info("nowhere")
    assert (tmp_path / "a.log").read_text() == ""
    assert undated((tmp_path / "b.log").read_text().splitlines()) == ["once"]


def test_log_file_is_appended_to(tmp_path: Path) -> None:
    for text in ("first attempt", "second attempt"):
        setup_logging(tmp_path / "train.log")
        logging.getLogger("ssd_fast").info(text)
    setup_logging(None)
    assert undated((tmp_path / "train.log").read_text().splitlines()) == ["first attempt", "second attempt"]


def test_other_packages_are_heard_from_warnings_on(log_lines: Callable[[], list[str]]) -> None:
    logging.getLogger("PIL").info("chatter")
    logging.getLogger("PIL").warning("a truncated file")
    logging.getLogger("dali_pipelines").info("an image was left out")
    assert undated(log_lines()) == ["warning: a truncated file", "an image was left out"]


def test_unwritable_log_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"missing.train\.log"):
        setup_logging(tmp_path / "missing" / "train.log")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_ends_the_log_file_with_one_warning(capfd: pytest.CaptureFixture[str]) -> None:
    setup_logging(Path("/dev/full"))
    for number in range(3):
        logging.getLogger("ssd_fast").info("line %d", number)
    setup_logging(None)
    screen = without_styles(capfd.readouterr().err)
    assert screen.count("/dev/full: no longer written: No space left on device") == 1
    assert [screen.count(f"line {number}") for number in range(3)] == [1, 1, 1]
    assert "Traceback" not in screen


SCRIPT = """
import logging
from pathlib import Path
from ssd_fast.progress import Progress, setup_logging, track
setup_logging(Path("train.log"))
with Progress(epochs=1) as progress:
    progress.start_epoch(1, 2)
    progress.update(1, 5.432, 1.234, 4.198, 0.0125, 812.34)
    logging.getLogger("ssd_fast").warning("careful")
    list(track([1], "evaluating"))
    print("result")
"""


@pytest.mark.parametrize("variables", [{}, {"FORCE_COLOR": "1"}, {"TERM": "dumb"}, {"NO_COLOR": "1"}])
def test_stderr_of_a_job_is_the_log_file_and_stdout_is_left_alone(tmp_path: Path, variables: dict[str, str]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **variables}
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert process.stdout == "result\n"
    assert process.stderr == (tmp_path / "train.log").read_text()
    assert "\x1b" not in process.stderr
    assert [line.split()[0] for line in undated(process.stderr.splitlines())] == ["epoch", "warning:", "evaluating"]


def test_terminal_shows_messages_and_the_display_instead_of_step_lines(tmp_path: Path) -> None:
    master, slave = os.openpty()
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TERM": "xterm", "COLUMNS": "80"}
    command = [sys.executable, "-c", SCRIPT]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=slave) as process:
        os.close(slave)
        screen = without_styles(read_to_end(master))
        assert process.stdout is not None
        assert process.stdout.read() == b"result\n"
    assert "careful" in screen
    assert "812.3 images/s" in screen
    assert "step 1/2" not in screen
    assert screen.rindex(SHOW_CURSOR) > screen.rindex(HIDE_CURSOR)
    assert "step 1/2" in (tmp_path / "train.log").read_text()


def read_to_end(terminal: int) -> str:
    chunks = []
    with open(terminal, "rb", buffering=0) as file:
        try:
            while chunk := file.read(4096):
                chunks.append(chunk)
        except OSError as error:  # how Linux says that the other side has closed
            if error.errno != errno.EIO:
                raise
    return b"".join(chunks).decode()


def without_styles(screen: str) -> str:
    return re.sub(r"\x1b\[[\d;]*m", "", screen)
