"""Progress of a long command for people: a live display on a terminal, plain dated lines elsewhere."""

import functools
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.logging import RichHandler
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

Item = TypeVar("Item")

_PACKAGES = ("ssd_fast", "dali_pipelines", "kernels")
_LINE_INTERVAL_S = 30.0

_logger = logging.getLogger(__name__)
_steps = logging.getLogger(f"{__name__}.steps")  # lines that a terminal's live display shows in its own way


def setup_logging(log_file: Path | None) -> None:
    """Send the project's messages, and warnings of other packages, to stderr and to a file.

    On a terminal they scroll above a live display. Elsewhere, and in the file, every line starts with its date.
    log_file: appended to; None for no file. A second call replaces the setup of the first.
    Raises OSError naming the file where it cannot be opened.
    """
    console = _terminal()
    screen: logging.Handler = logging.StreamHandler()
    screen.setFormatter(_PlainFormatter())
    if console.is_interactive:
        screen = RichHandler(console=console, show_path=False, log_time_format="%H:%M:%S", omit_repeated_times=False)
        screen.addFilter(lambda record: record.name != _steps.name)
    handlers = [screen]
    if log_file is not None:
        handlers.append(_LogFile(log_file, encoding="utf-8"))
        handlers[-1].setFormatter(_PlainFormatter())
    root = logging.getLogger()
    for handler in [old for old in root.handlers if old.name == __name__]:
        root.removeHandler(handler)
        handler.close()
    for handler in handlers:
        handler.name = __name__
        root.addHandler(handler)
    root.setLevel(logging.WARNING)
    for package in _PACKAGES:
        logging.getLogger(package).setLevel(logging.INFO)


class Progress:
    """The progress of training; a context in which a terminal shows the live display.

    Every update is a line of the log file; on a terminal it moves the live display instead of filling the screen.
    Epochs count from 1, steps are the done ones of the epoch. Rates and remaining times are those of training alone.
    """

    def __init__(
        self, *, epochs: int, console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """epochs: of the whole run. console: in place of stderr's. clock: seconds."""
        self._epochs = epochs
        self._console = console or _terminal()
        self._clock = clock
        self._epoch, self._step, self._steps = 0, 0, 0
        self._updated = 0.0
        self._recent_seconds, self._recent_steps = 0.0, 0.0  # of the last updates, the older the less they weigh
        self._figures: tuple[str, ...] = ()
        self._score = ""
        self._live = _live(lambda: self, self._console)

    def __enter__(self) -> Self:
        if self._console.is_interactive:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def start_epoch(self, epoch: int, steps: int, start_step: int = 0) -> None:
        """Begin an epoch of a number of steps, or continue it after start_step of them."""
        self._epoch, self._steps, self._step = epoch, steps, start_step
        self._updated = self._clock()

    def update(
        self,
        step_in_epoch: int,
        loss: float,
        box_loss: float,
        class_loss: float,
        learning_rate: float,
        images_per_second: float,
    ) -> None:
        """Show the figures after a step. The line of the last step of an epoch stays on a terminal's screen."""
        now = self._clock()
        if step_in_epoch > self._step:
            self._recent_seconds = 0.9 * self._recent_seconds + now - self._updated
            self._recent_steps = 0.9 * self._recent_steps + step_in_epoch - self._step
        self._step, self._updated = step_in_epoch, now
        self._figures = (
            f"loss {loss:.3f} (box {box_loss:.3f} class {class_loss:.3f})",
            f"lr {learning_rate:.4g}",
            f"{images_per_second:.1f} images/s",
        )
        logger = _logger if step_in_epoch == self._steps else _steps
        position = f"epoch {self._epoch}/{self._epochs} step {self._step}/{self._steps}"
        remaining = self._remaining((self._epochs - self._epoch) * self._steps)
        logger.info("%s %s ETA %s", position, " ".join(self._figures), remaining)

    def evaluation(self, epoch: int, map: float, map_50: float, seconds: float) -> None:
        """Show the scores (fractions) of the evaluation after an epoch, and its duration."""
        self._score = f"mAP {map:.4f} AP50 {map_50:.4f} after epoch {epoch}"
        _logger.info(
            "epoch %d/%d %s, took %s", epoch, self._epochs, f"mAP {map:.4f} AP50 {map_50:.4f}", _duration(seconds)
        )
        self._updated = self._clock()

    def __rich__(self) -> RenderableType:
        """The live display, three lines: position in the epoch, figures, remaining time and last scores."""
        if not self._steps:
            return Text("preparing", style="dim")
        epoch, done = f"epoch {self._epoch}/{self._epochs}", f"{self._step}/{self._steps}"
        run = f"whole run ETA {self._remaining((self._epochs - self._epoch) * self._steps)}"
        return Group(
            _bar(self._console, epoch, self._step, self._steps, done, f"ETA {self._remaining(0)}"),
            _row(zip(self._figures, ("bold", "cyan", "green"), strict=False)),
            _row([(run, ""), (self._score, "yellow")]),
        )

    def _remaining(self, later_steps: int) -> str:
        if not self._recent_steps:
            return "-:--:--"
        return _clock_time(self._recent_seconds / self._recent_steps * (self._steps - self._step + later_steps))


def track(
    items: Iterable[Item],
    description: str,
    total: int | None = None,
    *,
    console: Console | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Item]:
    """Iterate over items and show how many are done: a bar on a terminal, a line every half minute elsewhere.

    total: number of items; by default their len(), if they have one. A line with the duration ends the display.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    console = console or _terminal()
    start = reported = clock()
    done = 0

    live = _live(lambda: _bar(console, description, done, total, _count(done, total)), console, transient=True)
    if console.is_interactive:
        live.start()
    try:
        for item in items:
            yield item
            done += 1
            if clock() - reported >= _LINE_INTERVAL_S:
                reported = clock()
                _steps.info("%s %s", description, _count(done, total))
    finally:
        live.stop()
    _logger.info("%s %s, took %s", description, _count(done, total), _duration(clock() - start))


@functools.cache
def _terminal() -> Console:
    """The console of stderr that log lines and live displays share."""
    # FORCE_COLOR makes rich believe in a terminal; only a real one gets a live display
    return Console(stderr=True, force_interactive=None if sys.stderr.isatty() else False)


class _PlainFormatter(logging.Formatter):
    """Lines like `2026-01-31 12:00:00 text`, with the name of the level before a warning or an error."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        if record.levelno >= logging.WARNING:
            record.message = f"{record.levelname.lower()}: {record.message}"
        return super().formatMessage(record)


class _LogFile(logging.FileHandler):
    """A log file that is abandoned, with one line on stderr, when it cannot be written: the run matters more."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exception()
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        logging.getLogger().removeHandler(self)
        _logger.warning("%s: no longer written: %s", self.baseFilename, error.strerror)


def _live(get_renderable: Callable[[], RenderableType], console: Console, *, transient: bool = False) -> Live:
    return Live(
        get_renderable=get_renderable,
        console=console,
        refresh_per_second=2,
        transient=transient,
        redirect_stdout=sys.stdout.isatty(),  # results that go to a file or pipe must get there
    )


def _bar(console: Console, label: str, done: int, total: int | None, *ends: str) -> Table:
    grid = Table.grid(padding=(0, 1), expand=True)
    grid.width = console.width - 3  # room for the ^C that a terminal echoes, else it breaks the line and the display
    for ratio in (None, 1, *(None for _ in ends)):
        grid.add_column(ratio=ratio, no_wrap=True)
    grid.add_row(Text(label, style="bold"), ProgressBar(total=total, completed=done), *ends)
    return grid


def _row(parts: Iterable[tuple[str, str]]) -> Text:
    """One line of texts, each with its style, cut to the width of the terminal."""
    row = Text("   ").join(Text(text, style=style) for text, style in parts if text)
    row.no_wrap, row.overflow = True, "ellipsis"
    return row


def _count(done: int, total: int | None) -> str:
    return f"{done}/{total} ({done / total:.0%})" if total else f"{done}"


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else _clock_time(seconds)


def _clock_time(seconds: float) -> str:
    minutes, whole_seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{whole_seconds:02}"
