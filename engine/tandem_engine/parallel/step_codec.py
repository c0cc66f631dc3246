"""Batches on their way to the other ranks: block tables travel as what has been added to them."""

from collections.abc import Sequence
from typing import Final

from tandem_engine.parallel.messages import RankItem, RankStep
from tandem_engine.step import Batch, BatchItem
from tandem_wire.messages import SamplingParams

_UNUSED: Final = SamplingParams(max_tokens=1, temperature=0.0)
"""Only the first rank samples."""


class StepEncoder:
    """The sender. It remembers the tables of the step before, as the decoder does."""

    def __init__(self) -> None:
        self._sent: dict[str, tuple[Sequence[int], int]] = {}

    def encode(self, batch: Batch) -> RankStep:
        """The frame for every rank. A table only grows as long as it is the same object."""
        sent: dict[str, tuple[Sequence[int], int]] = {}
        items = []
        for item in batch.items:
            table = item.block_table
            before, known = self._sent.get(item.rid, (None, 0))
            if before is not table or known > len(table):
                known = 0
            sent[item.rid] = (table, len(table))
            tokens, added = item.tokens, table[known:]
            items.append(
                RankItem(item.rid, tokens, item.start, known, added, item.sample, item.previous)
            )
        self._sent = sent
        return RankStep(items, batch.copies)


class StepDecoder:
    """The receiver, which sees every frame in order."""

    def __init__(self) -> None:
        self._tables: dict[str, list[int]] = {}

    def decode(self, step: RankStep) -> Batch:
        """The batch that was sent."""
        tables: dict[str, list[int]] = {}
        items = []
        for item in step.items:
            table: list[int] = []  # a new object tells the runner that it is another table
            if item.known:
                table = self._tables[item.rid]
                del table[item.known :]
            table += item.blocks
            tables[item.rid] = table
            items.append(
                BatchItem(
                    rid=item.rid,
                    tokens=item.tokens,
                    start=item.start,
                    block_table=table,
                    sample=item.sample,
                    params=_UNUSED,
                    previous=item.previous,
                )
            )
        self._tables = tables
        return Batch(items, step.copies)
