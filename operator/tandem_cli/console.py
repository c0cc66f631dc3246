"""What the command prints: one console for progress (stderr), plain stdout for results."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)

from tandem_cli.errors import CliError

if TYPE_CHECKING:
    from tandem_local import ProgressEvent

console = Console(stderr=True, highlight=False)
results = Console(highlight=False, width=None if sys.stdout.isatty() else 200)


def print_error(error: CliError) -> None:
    """The message in red, the remedy below it."""
    # A message may quote logs, in which brackets are no markup.
    console.print(f"[bold red]error:[/] {escape(error.message)}", soft_wrap=True)
    if error.remedy:
        console.print(f"[bold]remedy:[/] {escape(error.remedy)}", soft_wrap=True)


class Steps:
    """Named steps with a bar each; on a pipe, one line per step and per ten percent."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}
        self._printed: dict[str, int] = {}

    def update(self, name: str, fraction: float, note: str = "") -> None:
        """Show `name` at `fraction` (0 to 1; 1 is done)."""
        text = f"{name} [dim]{note}[/]" if note else name
        if console.is_terminal:
            if name not in self._tasks:
                self._tasks[name] = self._progress.add_task(text, total=1.0)
            self._progress.update(self._tasks[name], completed=fraction, description=text)
            return
        tenth = int(fraction * 10)
        if self._printed.get(name, -1) < tenth:
            self._printed[name] = tenth
            console.print(f"{name}: {int(fraction * 100)} % {note}".rstrip())

    def follow(self, event: "ProgressEvent") -> None:
        """Show an event of the embedded cluster's progress."""
        share = event.done / event.total if event.done is not None and event.total else 0.0
        self.update(event.stage, share, event.message)


@contextmanager
def show_steps() -> Iterator[Steps]:
    """A block during which steps are drawn."""
    progress = Progress(
        SpinnerColumn(finished_text="[green]✓[/]"),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    with progress:
        yield Steps(progress)
