"""Results of a GPU: a line each, printed as they come, and written as one JSON file."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.markup import escape

from tandem_bench.errors import CheckFailedError, WrongResultError
from tandem_bench.gpu.device import Ceilings
from tandem_bench.terminal import notes, results


@dataclass(frozen=True, slots=True)
class Line:
    """One result. `floor` is the time that the ceilings of the same run allow."""

    name: str
    seconds: float
    floor: float
    error: float
    note: str = ""

    @property
    def percent(self) -> float:
        """The floor as a share of the time."""
        return 100.0 * self.floor / self.seconds

    def show(self) -> str:
        """One row of a table, in rich's markup."""
        percent = self.percent
        style = "green" if percent >= 85 else "yellow" if percent >= 60 else "red"
        return (
            f"  {self.name:44s} {self.seconds * 1e6:11,.1f} µs  floor {self.floor * 1e6:11,.1f} µs "
            f" [{style}]{percent:5.1f} %[/]  [dim]error {self.error:.1e}  {escape(self.note)}[/]"
        )

    def to_json(self) -> dict[str, object]:
        """All fields and the percentage."""
        return {**asdict(self), "percent": self.percent}


def best_of(lines: Sequence[Line]) -> Line:
    """The fastest."""
    return min(lines, key=lambda line: line.seconds)


class LineTable:
    """Prints lines as they come, keeps them for the file, and goes on after a wrong result."""

    def __init__(self, ceilings: Ceilings) -> None:
        self.lines: list[dict[str, object]] = []
        self.failed: list[str] = []
        self._ceilings = ceilings

    def keep(self, stage: str, line: Line, *, shown: bool = True) -> None:
        """One line; a configuration that lost need not be shown."""
        if shown:
            results.print(line.show(), soft_wrap=True)
        self.lines.append({"stage": stage, **line.to_json()})

    def take(self, stage: str, lines: Iterable[Line]) -> None:
        """All lines of one stage, under its name."""
        results.print(f"[bold]{stage}[/]")
        try:
            for line in lines:
                self.keep(stage, line)
        except WrongResultError as error:
            self.failed.append(f"{stage}: {error}")
            results.print(f"[red]wrong result[/] {error}", soft_wrap=True)

    def finish(self, config: dict[str, Any], json_file: Path | None, **more: Any) -> None:
        """Write the file. Raises CheckFailedError when a result was wrong."""
        if json_file is not None:
            import torch
            import triton

            ceilings = self._ceilings
            document = {
                "schema": "tandem-bench-kernels/1",
                "measured": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
                "device": ceilings.device,
                "copy_bytes_per_second": ceilings.copy,
                "matmul_per_second": ceilings.matmul,
                "torch": torch.__version__,
                "triton": triton.__version__,
                "config": config,
                **more,
                "lines": self.lines,
                "failed": self.failed,
            }
            json_file.write_text(json.dumps(document, indent=1) + "\n")
            notes.print(f"wrote {json_file}")
        if self.failed:
            raise CheckFailedError("; ".join(self.failed), "no time is reported for a wrong result")
