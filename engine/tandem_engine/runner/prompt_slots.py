"""The inputs of a GPU's steps with prompts, in device memory at addresses that never change."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from tandem_engine.attention.backend import StepTensors
from tandem_engine.runner.decode_slots import DecodeSlots
from tandem_engine.runner.step_input import place_chunks, write_rows
from tandem_engine.step import BatchItem


class PromptSlots:
    """Rows of a step with prompts, padded to one of a few sizes; decodes come first, then chunks.

    Steps of one size have their rows at the same addresses. The host sends them in one copy.

    Args:
        most: rows of the largest size.
        most_wanted: most rows whose logits are wanted.
    """

    def __init__(self, most: int, most_wanted: int, page: int, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._page = page
        # Rounded up to 16 bytes, on which kernels want what comes after it to be aligned.
        self._first = -(-most_wanted // 2) * 2
        self._numbers = torch.zeros(self._first + 4 * most, dtype=torch.int64, device=device)
        self._host = torch.zeros_like(self._numbers, device="cpu", pin_memory=on_gpu)
        self._view: np.ndarray = self._host.numpy()
        self.wanted = self._numbers[:most_wanted]
        """Rows of the step whose logits are wanted; the rest of it is padding that names row 0."""
        self._copied = torch.cuda.Event() if on_gpu else None

    def fill(
        self,
        decodes: DecodeSlots,
        num_decodes: int,
        items: Sequence[BatchItem],
        size: int,
        wanted: Sequence[int] = (),
    ) -> StepTensors:
        """A step of `size` rows: decodes, chunks, padding.

        Args:
            num_decodes: rows of what was staged in `decodes`, its padding included.
            items: the chunks.
            wanted: rows whose logits are wanted.
        """
        if self._copied is not None:
            self._copied.synchronize()
        count = num_decodes + sum(len(item.tokens) for item in items)
        end = self._first + 4 * size
        self._view[: self._first] = 0
        self._view[: len(wanted)] = wanted
        host = self._view[self._first : end].reshape(4, size)
        write_rows(items, self._page, host[:, num_decodes:count])
        host[:, count:] = 0
        host[2, count:] = -1
        self._numbers[:end].copy_(self._host[:end], non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        # After the copy, which overwrites the decodes' rows.
        step = decodes.fill(num_decodes, self._numbers[self._first : end].view(4, size))
        chunks, tables = place_chunks(items, num_decodes, self._page, self._numbers.device)
        return replace(step, chunks=chunks, chunk_tables=tables)
