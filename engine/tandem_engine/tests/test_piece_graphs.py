"""Padded steps of pieces against whole steps, with recorded functions in place of CUDA graphs."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from tandem_engine.attention.backend import StepTensors
from tandem_engine.config import WorkerConfig
from tandem_engine.load.runner import load_runner
from tandem_engine.runner.decode_slots import DecodeSlots
from tandem_engine.runner.piece_graphs import PieceGraphs, most_rows, piece_sizes
from tandem_engine.runner.prompt_slots import PromptSlots
from tandem_engine.runner.step_input import build_step, last_rows_of
from tandem_engine.runner.torch_runner import TorchRunner
from tandem_engine.startup import Startup
from tandem_engine.step import BatchItem
from tandem_engine.tests.step_driver import GREEDY
from tandem_engine.tests.test_model_equality import make_prompt
from tandem_engine.tests.tiny_checkpoints import FAMILIES, save_checkpoint

PAGE = 4
MOST = 144


def write(to: Any, values: Any) -> None:
    """Copy nested tensors to others of the same shapes."""
    if isinstance(to, torch.Tensor):
        to.copy_(values)
        return
    for one, value in zip(to, values, strict=True):
        write(one, value)


class Recording:
    """A function whose later results are written to its first ones."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self.run = run
        self.found = run()
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        write(self.found, self.run())


class HostDecodes:
    """Decode rows made on the host, in place of `DecodeSlots`."""

    def __init__(self, items: Sequence[BatchItem]) -> None:
        self.step = build_step(items, PAGE, torch.device("cpu")).tensors

    def fill(self, size: int, rows: torch.Tensor) -> StepTensors:
        assert size == self.step.num_decodes
        flat = (self.step.token_ids, self.step.positions)
        slots = (self.step.slot_blocks, self.step.slot_offsets)
        rows[:, :size] = torch.stack((*flat, *slots))
        ids, positions, blocks, offsets = rows.unbind()
        tables, lengths = self.step.decode_tables, self.step.decode_lengths
        return StepTensors(ids, positions, blocks, offsets, tables, lengths, (), tables[:0])


def item(tokens: Sequence[int], start: int, blocks: Sequence[int]) -> BatchItem:
    return BatchItem("r", tokens, start, blocks, True, GREEDY)


def test_sizes() -> None:
    assert piece_sizes(0) == []
    assert piece_sizes(48) == [48]
    assert piece_sizes(512) == [64, 128, 256, 384, 512]
    assert piece_sizes(1500)[-4:] == [896, 1024, 1280, 1500]
    assert len(piece_sizes(8192)) == 21


def test_small_models_have_larger_pieces() -> None:
    assert most_rows(218_000_000, 8192) == 1024
    assert most_rows(16_000_000, 8192) == 8192
    assert most_rows(16_000_000, 2000) == 2000
    assert most_rows(10**12, 2048) == 128
    assert most_rows(10**12, 10) == 0


def test_rows_of_a_step(tmp_path: Path) -> None:
    decodes = [item([7], 4, [5, 6])]
    chunks = [item([1, 2, 3], 2, [8, 9]), item([4, 5], 0, [3])]
    slots = PromptSlots(16, 3, PAGE, torch.device("cpu"))
    whole = [item(range(16), 0, [0, 1, 2, 3])]
    slots.fill(cast(DecodeSlots, HostDecodes([])), 0, whole, 16, [15, 3, 2])
    step = slots.fill(cast(DecodeSlots, HostDecodes(decodes)), 1, chunks, 8, [5, 0])
    assert slots.wanted.tolist() == [5, 0, 0]
    assert step.token_ids.tolist() == [7, 1, 2, 3, 4, 5, 0, 0]
    assert step.positions.tolist() == [4, 2, 3, 4, 0, 1, 0, 0]
    assert step.slot_blocks.tolist() == [6, 8, 8, 9, 3, 3, -1, -1]
    assert step.slot_offsets.tolist() == [0, 2, 3, 0, 0, 1, 0, 0]
    assert [(c.row, c.num_tokens, c.start) for c in step.chunks] == [(1, 3, 2), (4, 2, 0)]
    assert step.chunk_tables.tolist() == [[8, 9], [3, 0]]
    assert last_rows_of(chunks, 1) == [3, 5]


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_pieces_compute_what_whole_steps_do(family: str, tmp_path: Path) -> None:
    save_checkpoint(family, tmp_path)
    config = WorkerConfig(
        model=f"file://{tmp_path}", device="cpu", page_size=PAGE, kv_memory_bytes=8 << 20
    )
    runner = load_runner(config, Startup())
    assert isinstance(runner, TorchRunner)
    recorded: list[Recording] = []

    def record(run: Callable[[], Any]) -> tuple[Recording, Any]:
        recorded.append(Recording(run))
        return recorded[-1], recorded[-1].found

    model, attention = runner._model, runner._attention
    pieces = PieceGraphs(model, attention, MOST, record)
    slots = PromptSlots(MOST, 3, PAGE, torch.device("cpu"))
    for padded in pieces.sizes:
        pieces.run(slots.fill(cast(DecodeSlots, HostDecodes([])), 0, [], padded), 0)
    assert len(recorded) == len(pieces.sizes) * len(model.layers)

    tokens = make_prompt(100)
    first, second = list(range(0, 30)), list(range(40, 70))
    batches = [
        [item(tokens[:33], 0, first)],
        [item(tokens[33:34], 33, first), item(tokens[10:17], 0, second)],
        [item(tokens[34:70], 34, first), item(tokens[17:40], 7, second)],
        [item(tokens[70:71], 70, first), item(tokens[40:41], 30, second), item([3, 1], 0, [35])],
    ]
    for batch in batches:
        whole = build_step(batch, PAGE, torch.device("cpu"))
        rows = torch.tensor(whole.last_rows)
        expected = model.forward(whole.tensors, attention, rows)
        cache = runner.kv.cache.clone()
        decodes = [one for one in batch if len(one.tokens) == 1]
        chunks = [one for one in batch if len(one.tokens) > 1]
        count = sum(len(one.tokens) for one in batch)
        size = pieces.size_for(count)
        assert size is not None
        host = cast(DecodeSlots, HostDecodes(decodes))
        pieces.run(slots.fill(host, len(decodes), chunks, size, whole.last_rows), count)
        found = model.leave(pieces.attn_output, pieces.residual, slots.wanted[: len(batch)])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(runner.kv.cache, cache, rtol=1e-4, atol=1e-4)
    assert sum(recording.replays for recording in recorded) == len(batches) * len(model.layers)
    assert pieces.size_for(MOST + 1) is None
    runner.close()
