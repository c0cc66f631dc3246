"""A recorded workload, whatever form it was published in."""

import gzip
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tandem_bench.errors import WorkloadError

_GZIP: Final = b"\x1f\x8b"


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One recorded request; `at` in seconds after the trace's first."""

    at: float
    input_tokens: int
    output_tokens: int
    block_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Trace:
    """A recorded workload, in order of arrival."""

    name: str
    rows: list[TraceRow]
    block_tokens: int = 0  # of one block id; 0: the trace knows nothing of prefixes
    timed: bool = True  # whether `at` means anything

    @property
    def span(self) -> float:
        """Seconds from the first arrival to the last."""
        return self.rows[-1].at - self.rows[0].at if self.rows else 0.0


def read_text(path: Path) -> str:
    """A file's text, decompressed if it is gzipped. Raises WorkloadError."""
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if data[:2] == _GZIP else data).decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise WorkloadError(f"{path} can't be read: {error}", "check --trace") from error
