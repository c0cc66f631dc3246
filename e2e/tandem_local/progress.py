"""How a long operation reports its progress, and how a terminal shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import Progress as Bars


@dataclass(frozen=True)
class ProgressEvent:
    """One step of an operation that takes a while."""

    stage: str
    """The stage under way: `download`, `build`, `start`."""
    message: str
    """One line for people to read."""
    done: int | None = None
    """Units done, if they are counted."""
    total: int | None = None
    """Units in total, if that is known."""


Progress = Callable[[ProgressEvent], None]


def silent(event: ProgressEvent) -> None:
    """A Progress that discards every event."""


@contextmanager
def shown_progress(console: Console | None = None) -> Iterator[Progress]:
    """A Progress that draws bars on a terminal, and prints plain lines on anything else."""
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(console)
        return
    with Bars(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    ) as bars:
        yield _Drawn(bars)


class _Lines:
    """One line per message, and one per tenth of a counted total."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._said: tuple[str, int] | None = None

    def __call__(self, event: ProgressEvent) -> None:
        tenth = 10 * event.done // event.total if event.done and event.total else 0
        if (event.message, tenth) == self._said:
            return
        self._said = (event.message, tenth)
        counted = f" {event.done}/{event.total}" if event.total else ""
        self._console.print(f"==> {event.message}{counted}", highlight=False)


class _Drawn:
    """One bar for the current step."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._task = bars.add_task("", total=None)
        self._message = ""

    def __call__(self, event: ProgressEvent) -> None:
        if event.message != self._message:
            self._message = event.message
            self._bars.reset(self._task, description=event.message, total=event.total)
        self._bars.update(self._task, completed=event.done or 0, total=event.total)
