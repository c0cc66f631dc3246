"""The flat tensors of a step, from a batch of sequences."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tandem_engine.attention.backend import Chunk, StepTensors
from tandem_engine.device import upload
from tandem_engine.step import BatchItem


@dataclass(frozen=True, slots=True)
class StepInput:
    """A step's tensors, and the flat row of each item's last token in the batch's order."""

    tensors: StepTensors
    last_rows: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Split:
    """Places in a batch: of its decodes (items of one token), and of its chunks."""

    decodes: list[int]
    chunks: list[int]


def split_batch(items: Sequence[BatchItem], most_decodes: int | None = None) -> Split:
    """Tell decodes from chunks. Items of one token past `most_decodes` are chunks as well."""
    decodes = [index for index, item in enumerate(items) if len(item.tokens) == 1][:most_decodes]
    chosen = set(decodes)
    return Split(decodes, [index for index in range(len(items)) if index not in chosen])


def build_step(items: Sequence[BatchItem], page_size: int, device: torch.device) -> StepInput:
    """Lay the items out flat: the decodes first, then the chunks."""
    split = split_batch(items)
    decodes = [items[index] for index in split.decodes]
    tables, lengths = _decode_tables(decodes, page_size)
    positions = lengths - 1
    columns = (positions // page_size)[:, None]
    rows = StepTensors(
        token_ids=_tensor([item.tokens[0] for item in decodes], device),
        positions=_tensor(positions, device),
        slot_blocks=_tensor(np.take_along_axis(tables, columns, axis=1)[:, 0], device),
        slot_offsets=_tensor(positions % page_size, device),
        decode_tables=_tensor(tables, device),
        decode_lengths=_tensor(lengths, device),
        chunks=(),
        chunk_tables=_tensor(np.empty((0, 0), np.int64), device),
    )
    last_rows = [0] * len(items)
    for row, index in enumerate(split.decodes):
        last_rows[index] = row
    chunks = [items[index] for index in split.chunks]
    step = add_chunks(rows, chunks, page_size)
    for index, row in zip(split.chunks, last_rows_of(chunks, len(decodes)), strict=True):
        last_rows[index] = row
    return StepInput(step, tuple(last_rows))


def last_rows_of(items: Sequence[BatchItem], first: int) -> list[int]:
    """The flat row of each chunk's last token; the chunks begin at row `first`."""
    return [first + end - 1 for end in itertools.accumulate(len(item.tokens) for item in items)]


def add_chunks(decodes: StepTensors, items: Sequence[BatchItem], page_size: int) -> StepTensors:
    """The step of these decodes with chunks behind them."""
    if not items:
        return decodes
    device = decodes.token_ids.device
    first = decodes.num_decodes
    rows = np.empty((4, sum(len(item.tokens) for item in items)), np.int64)
    write_rows(items, page_size, rows)
    chunks, chunk_tables = place_chunks(items, first, page_size, device)

    def behind(before: torch.Tensor, values: np.ndarray) -> torch.Tensor:
        found = _tensor(values, device)
        return torch.cat((before, found)) if first else found

    return StepTensors(
        token_ids=behind(decodes.token_ids, rows[0]),
        positions=behind(decodes.positions, rows[1]),
        slot_blocks=behind(decodes.slot_blocks, rows[2]),
        slot_offsets=behind(decodes.slot_offsets, rows[3]),
        decode_tables=decodes.decode_tables,
        decode_lengths=decodes.decode_lengths,
        chunks=chunks,
        chunk_tables=chunk_tables,
    )


def write_rows(items: Sequence[BatchItem], page_size: int, rows: np.ndarray) -> None:
    """Write the ids, positions, blocks and offsets of the chunks' tokens to rows [4, T]."""
    row = 0
    for item in items:
        span = rows[:, row : row + len(item.tokens)]
        table = np.asarray(item.block_table[: -(-item.end // page_size)], np.int64)
        span[0] = item.tokens
        span[1] = np.arange(item.start, item.end)
        span[2] = table[span[1] // page_size]
        row += len(item.tokens)
    np.remainder(rows[1], page_size, out=rows[3])


def place_chunks(
    items: Sequence[BatchItem], first: int, page_size: int, device: torch.device
) -> tuple[tuple[Chunk, ...], torch.Tensor]:
    """The chunks, which begin at row `first`, and their block tables [C, M] in one upload."""
    widths = [-(-item.end // page_size) for item in items]
    tables = np.zeros((len(items), max(widths, default=0)), np.int64)
    chunks = []
    for item, width, table in zip(items, widths, tables, strict=True):
        table[:width] = item.block_table[:width]
        chunks.append(Chunk(first, len(item.tokens), item.start))
        first += len(item.tokens)
    return tuple(chunks), _tensor(tables, device)


def _tensor(values: np.ndarray | list[int], device: torch.device) -> torch.Tensor:
    return upload(values, torch.int64, device)


def _decode_tables(items: Sequence[BatchItem], page_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Block tables [B, M], each padded with its own last block, and lengths [B]."""
    lengths = np.array([item.end for item in items], np.int64)
    widths = -(-lengths // page_size)
    tables = np.empty((len(items), int(widths.max(initial=1))), np.int64)
    for row, (item, width) in enumerate(zip(items, widths.tolist(), strict=True)):
        tables[row, :width] = item.block_table[:width]
        tables[row, width:] = item.block_table[width - 1]
    return tables, lengths
