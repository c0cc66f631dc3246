"""The inputs of a GPU's decode steps, in device memory at addresses that never change."""

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch

from tandem_engine.attention.backend import StepTensors
from tandem_engine.step import BatchItem
from tandem_kernels.decode_inputs import DecodeInputs, fill_inputs

_MOST_ROW_COPIES: Final = 8
"""If more block tables than this have changed, all are copied in one piece."""


class DecodeSlots:
    """One row per decoding sequence, `max_rows` at most, written by the host before each step.

    Per sequence and step the host sends two numbers, and the block table when it has changed; a
    kernel makes the other inputs. CUDA graphs and attention plans hold views of these tensors.

    Args:
        max_blocks: entries of the longest block table.
    """

    def __init__(self, max_rows: int, max_blocks: int, page: int, device: torch.device) -> None:
        def rows(dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(max_rows, dtype=dtype, device=device)

        self.max_rows = max_rows
        self.sampled = rows(torch.int64)
        """Tokens that the last step sampled, one per row."""
        self._page = page
        self._tables = torch.zeros((max_rows, max_blocks), dtype=torch.int32, device=device)
        self._staged = torch.zeros((2, max_rows), dtype=torch.int32, device=device)
        self._inputs = DecodeInputs(
            token_ids=rows(torch.int64),
            positions=rows(torch.int64),
            slot_blocks=rows(torch.int64),
            slot_offsets=rows(torch.int64),
            lengths=rows(torch.int32),
        )
        self._host_tables = torch.zeros((max_rows, max_blocks), dtype=torch.int32, pin_memory=True)
        self._host_staged = torch.zeros((2, max_rows), dtype=torch.int32, pin_memory=True)
        self._tables_view: np.ndarray = self._host_tables.numpy()
        self._staged_view: np.ndarray = self._host_staged.numpy()
        self._shown: list[tuple[Sequence[int], int]] = [((), 0)] * max_rows
        self._copied = torch.cuda.Event()

    def stage(self, items: Sequence[BatchItem]) -> None:
        """Send the rows of the next step. Call it before `fill`, on the steps' stream."""
        # The copies for the step before may still read this host memory.
        self._copied.synchronize()
        self._staged_view[1] = -1
        count = len(items)
        self._staged_view[0, :count] = [
            item.tokens[0] if item.previous < 0 else -1 - item.previous for item in items
        ]
        self._staged_view[1, :count] = [item.start for item in items]
        self._staged.copy_(self._host_staged, non_blocking=True)
        self._send_tables(self._changed_rows(items), count)
        self._copied.record()

    def _changed_rows(self, items: Sequence[BatchItem]) -> list[int]:
        """Update the host's block tables; returns the rows that the device doesn't have yet."""
        changed = []
        for row, item in enumerate(items):
            table = item.block_table
            shown, length = self._shown[row]
            if shown is table and length == len(table):
                continue
            self._tables_view[row, : len(table)] = table
            self._shown[row] = (table, len(table))
            changed.append(row)
        return changed

    def _send_tables(self, rows: list[int], count: int) -> None:
        if len(rows) > _MOST_ROW_COPIES:
            self._tables[:count].copy_(self._host_tables[:count], non_blocking=True)
            return
        for row in rows:
            self._tables[row].copy_(self._host_tables[row], non_blocking=True)

    def fill(self, size: int, rows: torch.Tensor | None = None) -> StepTensors:
        """A step of `size` rows of what `stage` sent; rows without a sequence are padding.

        Args:
            rows: [4, T] int64: ids, positions, blocks and offsets of a step with further rows after
                these. This step's are written to it, and the result's tensors are views of it.
        """
        whole, tables = self._inputs.first(size), self._tables[:size]
        if rows is not None:
            ids, positions, blocks, offsets = rows.unbind()
            whole = DecodeInputs(ids, positions, blocks, offsets, whole.lengths)
        if size:
            inputs = whole.first(size)
            fill_inputs(self._staged[:, :size], self.sampled, tables, self._page, inputs)
        return StepTensors(
            token_ids=whole.token_ids,
            positions=whole.positions,
            slot_blocks=whole.slot_blocks,
            slot_offsets=whole.slot_offsets,
            decode_tables=tables,
            decode_lengths=whole.lengths,
            chunks=(),
            chunk_tables=tables[:0],
        )
