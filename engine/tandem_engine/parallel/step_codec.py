"""Batches on their way to the other ranks. Of a block table, only what was added to it travels."""

from collections.abc import Sequence
from typing import Final

from tandem_engine.parallel.messages import RankItem, RankStep
from tandem_engine.step import Batch, BatchItem
from tandem_wire.messages import SamplingParams

_UNUSED: Final = SamplingParams(max_tokens=1, temperature=0.0)
"""Parameters for the other ranks, which never sample."""


class StepEncoder:
    """The sender. Like the decoder, it remembers the tables of the step before."""

    def __init__(self) -> None:
        self._sent: dict[str, tuple[Sequence[int], int]] = {}

    def encode(self, batch: Batch) -> RankStep:
        """The frame for every rank. As long as a table is the same object, it has only grown."""
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
        return RankStep(items, batch.copies, batch.scored)


class StepDecoder:
    """The receiver, which gets every frame in order."""

    def __init__(self) -> None:
        self._tables: dict[str, list[int]] = {}

    def decode(self, step: RankStep) -> Batch:
        """The batch that a frame stands for."""
        tables: dict[str, list[int]] = {}
        items = []
        for item in step.items:
            table: list[int] = []  # a new object, by which the runner knows that the table is new
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
        return Batch(items, step.copies, step.scored)
