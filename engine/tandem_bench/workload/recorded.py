"""Recorded workloads: what they hold, and reading the published forms.

- Mooncake (`*.jsonl`): `timestamp` (ms), `input_length`, `output_length`, `hash_ids` (512 tokens
  a block). Equal ids are equal prefixes.
- Azure LLM inference 2023 (`*.csv`): `TIMESTAMP` (UTC), `ContextTokens`, `GeneratedTokens`.
- ServeGen (`*_arrivals.csv` with `*_lengths.csv` beside it): see `servegen.py`.
- Vidur (`*.csv`): `num_prefill_tokens`, `num_decode_tokens`; it has no times, so it needs a rate.

Each may be gzipped.
"""

import csv
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Final

import msgspec

from tandem_bench.errors import WorkloadError
from tandem_bench.workload.trace_rows import Trace, TraceRow, read_text

MOONCAKE_BLOCK_TOKENS: Final = 512


class _MooncakeRow(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int] = []


def read_trace(path: Path, seed: int = 0) -> Trace:
    """Recognize the form by its first line and read it.

    `seed` is for forms that give distributions instead of requests (ServeGen).

    Raises:
        WorkloadError: the form is unknown, or a row is damaged.
    """
    text = read_text(path)
    first = text.split("\n", 1)[0].strip()
    name = path.name.removesuffix(".gz").rsplit(".", 1)[0]
    try:
        if first.startswith("{"):
            rows, block_tokens, timed = list(_mooncake(text)), MOONCAKE_BLOCK_TOKENS, True
        elif "ContextTokens" in first:
            rows, block_tokens, timed = list(_azure(text)), 0, True
        elif "num_prefill_tokens" in first:
            rows, block_tokens, timed = list(_vidur(text)), 0, False
        elif "window_start_s" in first and "pattern" in first:
            from tandem_bench.workload.servegen import read_servegen

            rows, block_tokens, timed = read_servegen(path, text, seed), 0, True
        else:
            raise WorkloadError(
                f"{path} starts with {first[:60]!r}, which is not a known form",
                "give a Mooncake .jsonl, an Azure, ServeGen (arrivals) or Vidur .csv",
            )
    except (msgspec.DecodeError, KeyError, ValueError) as error:
        if isinstance(error, WorkloadError):
            raise
        raise WorkloadError(f"{path}: {error}", "the file is damaged; fetch it again") from error
    rows = [row for row in rows if row.input_tokens > 0 and row.output_tokens > 0]
    rows.sort(key=lambda row: row.at)
    if not rows:
        raise WorkloadError(f"{path} holds no requests", "check --trace")
    return Trace(name, rows, block_tokens, timed)


def _mooncake(text: str) -> Iterator[TraceRow]:
    decoder = msgspec.json.Decoder(_MooncakeRow)
    for row in decoder.decode_lines(text):
        ids = tuple(row.hash_ids)
        yield TraceRow(row.timestamp / 1e3, row.input_length, row.output_length, ids)


def _azure(text: str) -> Iterator[TraceRow]:
    for row in csv.DictReader(text.splitlines()):
        # Seven digits of a second: datetime reads six.
        stamp, _, digits = row["TIMESTAMP"].partition(".")
        at = datetime.fromisoformat(f"{stamp}+00:00").timestamp() + float(f"0.{digits or 0}")
        yield TraceRow(at, int(row["ContextTokens"]), int(row["GeneratedTokens"]))


def _vidur(text: str) -> Iterator[TraceRow]:
    for row in csv.DictReader(text.splitlines()):
        yield TraceRow(0.0, int(row["num_prefill_tokens"]), int(row["num_decode_tokens"]))
