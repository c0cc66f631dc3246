"""What benchmarks print: results on standard output, progress and remarks on standard error."""

import sys
import time
from types import TracebackType
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

notes = Console(stderr=True, highlight=False)
results = Console(highlight=False, width=None if sys.stdout.isatty() else 200)

DRAWING_SECONDS: Final = 0.1


class Bars:
    """A bar per name; on a pipe a line per name and tenth of it.

    They are drawn where `update` is called: a drawing thread would hold the interpreter while a
    benchmark runs.
    """

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("[dim]{task.fields[note]}[/]"),
            TimeElapsedColumn(),
            console=notes,
            auto_refresh=False,
            disable=not notes.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._tenths: dict[str, int] = {}
        self._drawn = 0.0

    def __enter__(self) -> "Bars":
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def update(self, name: str, fraction: float, note: str = "") -> None:
        """Show `name` at `fraction` (0 to 1; 1 is done)."""
        tenth = int(fraction * 10)
        passed = self._tenths.get(name, -1) < tenth
        self._tenths[name] = max(tenth, self._tenths.get(name, -1))
        if not notes.is_terminal:
            if passed:
                notes.print(f"{name}: {int(fraction * 100)} % {note}".rstrip())
            return
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=1.0, note=note)
        self._progress.update(self._tasks[name], completed=fraction, note=note)
        now = time.monotonic()
        if passed or now - self._drawn > DRAWING_SECONDS:
            self._drawn = now
            self._progress.refresh()
