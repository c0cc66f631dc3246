"""Sampling and KV packing against copy bandwidth."""

from collections.abc import Sequence
from functools import partial

import torch

from tandem_bench.errors import WrongResultError
from tandem_bench.gpu.device import Ceilings
from tandem_bench.gpu.lines import Line
from tandem_bench.gpu.timing import Call, check, seconds_per_call
from tandem_kernels.sampling.draw_kernel import draw
from tandem_kernels.sampling.kernel import greedy
from tandem_kernels.sampling.penalty_kernel import penalize
from tandem_kernels.sampling.reference import filter_logits, sample_inverse_cdf, uniform
from tandem_kernels.sampling.reference import penalize as reference_penalize
from tandem_kernels.transfer import kernel as transfer
from tandem_kernels.transfer import reference as transfer_reference

SAMPLING_TILES = ((2048, 4), (4096, 8), (1024, 4))
"""(block, warps), the default first."""


def run_sampling(
    rows: int,
    vocab: int,
    ceilings: Ceilings,
    dtype: torch.dtype = torch.float32,
    tiles: Sequence[tuple[int, int]] = SAMPLING_TILES[:1],
) -> list[Line]:
    """Greedy, and draws under several filters; the floor is one read of the logits."""
    logits = (torch.randn(rows, vocab, device="cuda") * 2.5).to(dtype)
    floor = logits.nbytes / ceilings.copy
    lines = []
    kind = str(dtype).removeprefix("torch.")
    best = greedy(logits)
    # By value: torch's argmax promises no order among equals.
    if not torch.equal(logits.gather(1, best[:, None])[:, 0], logits.amax(-1)):
        raise WrongResultError("greedy differs from argmax")
    seconds = seconds_per_call([lambda: greedy(logits)] * 3)
    lines.append(Line(f"greedy {rows} x {vocab} {kind}", seconds, floor, 0.0))
    seeds, positions = torch.arange(rows, device="cuda"), torch.arange(rows, device="cuda") * 3
    for k, p, m in ((0, 1.0, 0.0), (50, 1.0, 0.0), (0, 0.9, 0.0), (50, 0.9, 0.02)):
        columns = (
            torch.full((rows,), 0.8, device="cuda"),
            torch.full((rows,), k, device="cuda"),
            torch.full((rows,), p, device="cuda"),
            torch.full((rows,), m, device="cuda"),
        )
        kept = filter_logits(logits.float() / columns[0][:, None], *columns[1:])
        draws = [uniform(i, 3 * i) for i in range(rows)]
        expected = sample_inverse_cdf(kept, torch.tensor(draws, dtype=torch.float64, device="cuda"))
        for block, warps in tiles:
            rest = (seeds, positions)
            given = partial(draw, best=best, searched=k > 0 or p < 1.0, block=block, warps=warps)
            call = partial(given, logits, *columns, *rest)
            different = int((call() != expected).sum())
            if different > max(1, rows // 50):
                raise WrongResultError(f"{different} of {rows} draws differ, k={k} p={p} m={m}")
            seconds = seconds_per_call([call] * 3)
            name = f"draw {rows} x {vocab} {kind} k={k} p={p} m={m}"
            note = f"block {block} warps {warps}, {different} differ"
            lines.append(Line(name, seconds, floor, 0.0, note))
    return lines


def run_penalties(
    rows: int, vocab: int, ceilings: Ceilings, dtype: torch.dtype = torch.float32
) -> list[Line]:
    """Penalties with the new argmax, alone and before a draw under every filter.

    The floor of the first is to read logits and marks and to write logits; of the second, to read
    those once more.
    """
    logits = (torch.randn(rows, vocab, device="cuda") * 2.5).to(dtype)
    seen = 3 * (torch.rand(rows, vocab, device="cuda") < 0.01).int()
    slots = torch.arange(rows, device="cuda", dtype=torch.int32)
    repetition, frequency, presence = (
        torch.full((rows,), value, device="cuda") for value in (1.2, 0.1, 0.1)
    )
    factors = (repetition, frequency, presence)
    warmth, k, p, m = (torch.full((rows,), value, device="cuda") for value in (0.8, 50, 0.9, 0.02))
    numbers = torch.arange(rows, device="cuda")
    expected, _ = reference_penalize(logits, seen, slots, *factors)
    penalized, _ = penalize(logits, seen, slots, *factors)
    error = check("penalize", penalized, expected, 1e-6)

    def alone() -> object:
        return penalize(logits, seen, slots, *factors)

    def together() -> object:
        changed, best = penalize(logits, seen, slots, *factors)
        return draw(changed, warmth, k, p, m, numbers, numbers, best=best)

    moved = logits.nbytes + seen.nbytes + penalized.nbytes
    kind = str(dtype).removeprefix("torch.")
    return [
        Line(
            f"penalize {rows} x {vocab} {kind}{what}",
            seconds_per_call([call] * 3),
            size / ceilings.copy,
            error,
        )
        for call, size, what in (
            (alone, moved, ""),
            (together, moved + penalized.nbytes, ", all filters"),
        )
    ]


def run_transfer(ceilings: Ceilings) -> list[Line]:
    """Llama-8B's cache: 128 blocks of 64 tokens, all layers; and half of the heads."""
    cache = torch.randn(32, 2, 200, 8, 64, 128, device="cuda", dtype=torch.bfloat16)
    blocks = torch.randperm(200, device="cuda")[:128]
    lines = []
    for heads in (None, range(0, 4)):
        expected = transfer_reference.pack(cache, blocks, range(32), heads)
        out = torch.full_like(expected, float("nan"))
        for piece in (2048, 8192, 16384):
            which = (blocks, range(32), heads)
            pack: Call = partial(transfer.pack, cache, *which, out, piece=piece)
            unpack: Call = partial(transfer.unpack, out, cache, *which, piece=piece)
            pack()
            error = check("pack", out, expected, 1e-9)
            for name, call in (("pack", pack), ("unpack", unpack)):
                seconds = seconds_per_call([call] * 3)
                what = f"{name} 128 blocks, {'all' if heads is None else len(heads)} heads"
                floor = 2 * out.nbytes / ceilings.copy
                lines.append(Line(what, seconds, floor, error, f"piece {piece}"))
    return lines
