"""From a batch of sequences to a step's flat tensors."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tandem_engine.attention.backend import Chunk, StepTensors
from tandem_engine.runner.base import BatchItem


@dataclass(frozen=True, slots=True)
class StepInput:
    """A step's tensors, and the flat row of each item's last token in the batch's order."""

    tensors: StepTensors
    last_rows: tuple[int, ...]


def build_step(items: Sequence[BatchItem], page_size: int, device: torch.device) -> StepInput:
    """Lay the items out flat: those of one token first, then the chunks."""
    decodes = [index for index, item in enumerate(items) if len(item.tokens) == 1]
    chunks = [index for index, item in enumerate(items) if len(item.tokens) > 1]
    last_rows = [0] * len(items)
    num_tokens = sum(len(item.tokens) for item in items)
    token_ids = np.empty(num_tokens, np.int64)
    positions = np.empty(num_tokens, np.int64)
    slot_blocks = np.empty(num_tokens, np.int64)
    for row, index in enumerate(decodes):
        item = items[index]
        token_ids[row], positions[row] = item.tokens[0], item.start
        slot_blocks[row] = item.block_table[item.start // page_size]
        last_rows[index] = row
    row = len(decodes)
    found: list[Chunk] = []
    for index in chunks:
        item = items[index]
        span = slice(row, row + len(item.tokens))
        table = np.asarray(item.block_table[: -(-item.end // page_size)], np.int64)
        token_ids[span] = item.tokens
        positions[span] = np.arange(item.start, item.end)
        slot_blocks[span] = table[positions[span] // page_size]
        block_table = torch.from_numpy(table).to(device)
        found.append(Chunk(row, len(item.tokens), item.start, block_table))
        row = span.stop
        last_rows[index] = row - 1
    tables, lengths = _decode_tables([items[index] for index in decodes], page_size)
    tensors = StepTensors(
        token_ids=torch.from_numpy(token_ids).to(device),
        positions=torch.from_numpy(positions).to(device),
        slot_blocks=torch.from_numpy(slot_blocks).to(device),
        slot_offsets=torch.from_numpy(positions % page_size).to(device),
        decode_tables=torch.from_numpy(tables).to(device),
        decode_lengths=torch.from_numpy(lengths).to(device),
        chunks=tuple(found),
    )
    return StepInput(tensors, tuple(last_rows))


def _decode_tables(items: Sequence[BatchItem], page_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Block tables [B, M], each padded with its own last block, and lengths [B]."""
    lengths = np.array([item.end for item in items], np.int64)
    widths = -(-lengths // page_size)
    tables = np.empty((len(items), int(widths.max(initial=0))), np.int64)
    for row, (item, width) in enumerate(zip(items, widths.tolist(), strict=True)):
        tables[row, :width] = item.block_table[:width]
        tables[row, width:] = item.block_table[width - 1]
    return tables, lengths
