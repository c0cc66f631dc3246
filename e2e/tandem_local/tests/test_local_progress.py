"""Progress as people see it."""

from __future__ import annotations

import io

from rich.console import Console

from tandem_local.progress import ProgressEvent, shown_progress


def test_plain_output_has_a_line_per_step_and_tenth() -> None:
    file = io.StringIO()
    with shown_progress(Console(file=file, width=100)) as progress:
        progress(ProgressEvent("start", "waiting for the nodes"))
        progress(ProgressEvent("start", "waiting for the nodes"))
        for done in range(101):
            progress(ProgressEvent("build", "compiling", done, 100))
    lines = file.getvalue().splitlines()
    assert lines[0] == "==> waiting for the nodes"
    assert len(lines) == 12
    assert lines[-1] == "==> compiling 100/100"


def test_a_terminal_shows_a_bar() -> None:
    file = io.StringIO()
    with shown_progress(Console(file=file, force_terminal=True, width=100)) as progress:
        progress(ProgressEvent("build", "compiling", 0, 40))
        progress(ProgressEvent("build", "compiling", 20, 40))
    assert "compiling" in file.getvalue()
    assert "20/40" in file.getvalue()
