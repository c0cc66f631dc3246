"""The report as JSON: what `--json` writes and `--compare` reads."""

from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import msgspec

from tandem_bench.errors import ReportError
from tandem_bench.record import RequestRecord
from tandem_bench.report.summary import Summary

SCHEMA: Final = "tandem-bench-serve/1"


class RequestRow(msgspec.Struct, frozen=True, array_like=True):
    """One request; seconds after the start of its run."""

    number: int
    scheduled: float
    sent: float
    ttft: float | None
    ended: float | None
    input_tokens: int
    output_tokens: int
    longest_gap: float | None
    error: str

    @classmethod
    def of(cls, record: RequestRecord) -> "RequestRow":
        """The row of a request that was sent."""
        times = record.times
        gaps = [b - a for a, b in pairwise(times)]
        return cls(
            record.number,
            round(record.scheduled, 6),
            round(record.sent, 6),
            round(record.ttft, 6) if times else None,
            round(record.ended, 6) if record.ended == record.ended else None,
            record.input_tokens or record.requested_input,
            record.output_tokens,
            round(max(gaps), 6) if gaps else None,
            record.error,
        )


class Run(msgspec.Struct, frozen=True):
    """One run of a sweep."""

    summary: Summary
    requests: list[RequestRow] = []


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """A whole call of `tandem bench serve`."""

    schema: str = SCHEMA
    title: str
    started: str
    """UTC, ISO 8601."""
    command: str
    config: dict[str, Any]
    environment: dict[str, str]
    runs: list[Run]


def write_report(report: Report, path: Path) -> None:
    """Write the report as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.encode(report) + b"\n")


def read_report(path: Path) -> Report:
    """Read what `write_report` wrote.

    Raises:
        ReportError: the file is something else.
    """
    try:
        report = msgspec.json.decode(path.read_bytes(), type=Report)
    except (OSError, msgspec.DecodeError) as error:
        raise ReportError(
            f"{path} is not a report: {error}", "give files written by `tandem bench serve --json`"
        ) from error
    if report.schema != SCHEMA:
        raise ReportError(
            f"{path} has the schema {report.schema!r}, but this version reads {SCHEMA!r}",
            "measure again with this version",
        )
    return report
