"""Progress on standard error: a live bar on a terminal, a line now and then in a log file, or nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

LINE_SECONDS = 10.0  # in a log file: a line per tenth of the stage, but never two within this time ...
QUIET_SECONDS = 60.0  # ... and never silent for longer than this


class Progress(Protocol):
    """Shows how far a stage has come."""

    def start(self, stage: str, total: int, done: int) -> None:
        """Begin a stage of `total` steps, `done` of which an earlier session took."""

    def update(self, done: int, terms: Mapping[str, float] | None = None) -> None:
        """Show the number of finished steps and, if new, the means of the loss terms."""

    def note(self, text: str) -> None:
        """Say one sentence."""

    def stop(self) -> None:
        """End the stage."""


def progress(*, enabled: bool = True) -> Progress:
    """The display that fits standard error.

    Args:
        enabled: False for silence.

    Returns:
        A rich progress bar on a terminal; plain lines elsewhere.
    """
    if not enabled:
        return Silent()
    if sys.stderr.isatty():
        return Bar()
    return Lines()


def in_words(terms: Mapping[str, float]) -> str:
    """Loss terms in one line.

    Example:
        >>> in_words({"kl": 0.012345, "ce": 2.0})
        'kl 0.01235  ce 2'
    """
    return "  ".join(f"{name} {value:.4g}" for name, value in terms.items())


def duration(seconds: float) -> str:
    """Seconds as minutes and seconds, or hours and minutes.

    Example:
        >>> duration(75), duration(7260)
        ('1:15 min', '2:01 h')
    """
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d} min"
    return f"{minutes // 60}:{minutes % 60:02d} h"


class Silent:
    """Shows nothing."""

    def start(self, stage: str, total: int, done: int) -> None:
        """Nothing to show."""

    def update(self, done: int, terms: Mapping[str, float] | None = None) -> None:
        """Nothing to show."""

    def note(self, text: str) -> None:
        """Nothing to say."""

    def stop(self) -> None:
        """Nothing to end."""


class Lines:
    """Plain lines for log files: one per tenth of the stage, at least 10 and at most 60 seconds apart, and the last.

    Args:
        clock: seconds, for tests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._stage, self._total, self._from, self._begin = "", 0, 0, 0.0
        self._last_done, self._last_time, self._terms = 0, 0.0, ""

    def start(self, stage: str, total: int, done: int) -> None:
        """Begin a stage; nothing is written yet."""
        self._stage, self._total, self._from = stage, total, done
        self._begin = self._last_time = self._clock()
        self._last_done, self._terms = done, ""

    def update(self, done: int, terms: Mapping[str, float] | None = None) -> None:
        """Write a line if one is due."""
        if terms is not None:
            self._terms = in_words(terms)
        now = self._clock()
        waited, tenth = now - self._last_time, 10 * (done - self._last_done) >= self._total
        if done < self._total and not (waited >= LINE_SECONDS and tenth) and waited < QUIET_SECONDS:
            return
        self._last_done, self._last_time = done, now
        spent = now - self._begin
        line = f"{self._stage} {done}/{self._total}"
        if done < self._total and done > self._from:
            line += f"  {duration(spent / (done - self._from) * (self._total - done))} left"
        else:
            line += f"  {duration(spent)}"
        self.note(f"{line}  {self._terms}".rstrip())

    def note(self, text: str) -> None:
        """Write one line."""
        sys.stderr.write(text + "\n")
        sys.stderr.flush()

    def stop(self) -> None:
        """Nothing to end."""


class Bar:
    """A live bar: stage, steps, time left and loss terms."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True)
        self._rich: RichProgress | None = None
        self._task: TaskID | None = None

    def start(self, stage: str, total: int, done: int) -> None:
        """Open the bar of a stage."""
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._rich = RichProgress(
            TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[terms]}", markup=False), console=self._console, refresh_per_second=4,
            redirect_stdout=False,  # standard output belongs to results
        )  # fmt: skip
        self._task = self._rich.add_task(stage, total=total, completed=done, terms="")
        self._rich.start()

    def update(self, done: int, terms: Mapping[str, float] | None = None) -> None:
        """Move the bar."""
        if self._rich is None or self._task is None:
            return
        if terms is None:
            self._rich.update(self._task, completed=done)
        else:
            self._rich.update(self._task, completed=done, terms=in_words(terms))

    def note(self, text: str) -> None:
        """Write one line above the bar."""
        self._console.print(text, markup=False, highlight=False)

    def stop(self) -> None:
        """Leave the bar on the screen as it is."""
        if self._rich is not None:
            self._rich.stop()
            self._rich = None
