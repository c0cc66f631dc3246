"""What a GPU's steps with prompts read, in device memory at addresses that never change."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from tandem_engine.attention.backend import StepTensors
from tandem_engine.runner.base import BatchItem
from tandem_engine.runner.decode_slots import DecodeSlots
from tandem_engine.runner.step_input import place_chunks, write_rows


class PromptSlots:
    """Rows of a step with prompts, padded to one of a few sizes; decodes come first, then chunks.

    Steps of one size have their rows at the same addresses. The host sends them in one copy.

    Args:
        most: rows of the largest size.
    """

    def __init__(self, most: int, page: int, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._page = page
        self._rows = torch.zeros(4 * most, dtype=torch.int64, device=device)
        self._host = torch.zeros(4 * most, dtype=torch.int64, pin_memory=on_gpu)
        self._view: np.ndarray = self._host.numpy()
        self._copied = torch.cuda.Event() if on_gpu else None

    def fill(
        self, decodes: DecodeSlots, num_decodes: int, items: Sequence[BatchItem], size: int
    ) -> tuple[StepTensors, list[int]]:
        """A step of `size` rows, and the row of each chunk's last token.

        Args:
            num_decodes: rows, padding among them, of what was staged in `decodes`.
            items: the chunks.
        """
        if self._copied is not None:
            self._copied.synchronize()
        count = num_decodes + sum(len(item.tokens) for item in items)
        host = self._view[: 4 * size].reshape(4, size)
        write_rows(items, self._page, host[:, num_decodes:count])
        host[:, count:] = 0
        host[2, count:] = -1
        rows = self._rows[: 4 * size]
        rows.copy_(self._host[: 4 * size], non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        # After the copy, which wrote something to the decodes' rows too.
        step = decodes.fill(num_decodes, rows.view(4, size))
        chunks, ends = place_chunks(items, num_decodes, self._page, rows.device)
        return replace(step, chunks=chunks), ends
