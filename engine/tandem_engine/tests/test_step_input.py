"""How a batch is laid out for the model."""

from collections.abc import Sequence

import torch

from tandem_engine.runner.step_input import build_step, split_batch
from tandem_engine.step import BatchItem
from tandem_wire.messages import SamplingParams

PAGE = 4
GREEDY = SamplingParams(max_tokens=1, temperature=0.0)


def item(tokens: Sequence[int], start: int, blocks: Sequence[int]) -> BatchItem:
    return BatchItem("r", tokens, start, blocks, True, GREEDY)


def test_single_tokens_past_the_limit_are_chunks() -> None:
    items = [item([1], 3, [0]), item([1, 2], 0, [1]), item([3], 0, [2]), item([4], 2, [3])]
    whole, limited = split_batch(items), split_batch(items, 2)
    assert (whole.decodes, whole.chunks) == ([0, 2, 3], [1])
    assert (limited.decodes, limited.chunks) == ([0, 2], [1, 3])
    assert split_batch(items, 0).chunks == [0, 1, 2, 3]


def test_decodes_come_first_and_every_row_knows_its_slot() -> None:
    items = [item([7, 8, 9], 3, [5, 6]), item([4], 8, [1, 2, 3]), item([1, 2], 0, [9])]
    step = build_step(items, PAGE, torch.device("cpu"))
    tensors = step.tensors
    assert tensors.token_ids.tolist() == [4, 7, 8, 9, 1, 2]
    assert tensors.positions.tolist() == [8, 3, 4, 5, 0, 1]
    assert tensors.slot_blocks.tolist() == [3, 5, 6, 6, 9, 9]
    assert tensors.slot_offsets.tolist() == [0, 3, 0, 1, 0, 1]
    assert tensors.decode_lengths.tolist() == [9]
    assert [(c.row, c.num_tokens, c.start) for c in tensors.chunks] == [(1, 3, 3), (4, 2, 0)]
    assert tensors.chunk_tables.tolist() == [[5, 6], [9, 0]]
    assert step.last_rows == (3, 0, 5)
