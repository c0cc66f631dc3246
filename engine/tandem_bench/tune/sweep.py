"""Try every configuration of every kernel, print the best ones, write all of it as JSON."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Final

import torch
import triton

from tandem_bench.errors import WorkloadError
from tandem_bench.gpu.device import Ceilings, find_ceilings
from tandem_bench.gpu.lines import Line, LineTable
from tandem_bench.kernels import memory, mla, prefill_attention, rows
from tandem_bench.kernels.decode_attention import DECODE_CASES, DecodeBench, DecodeTiles
from tandem_bench.options import argument, json_option
from tandem_bench.tune.gemm import tune_products
from tandem_bench.tune.mla import tune_decode as tune_mla_decode
from tandem_bench.tune.search import keep_best

DECODE_TILES: Final = [
    (32, 4, 4), (32, 4, 6), (64, 4, 2), (64, 4, 3), (64, 4, 4), (64, 8, 3), (128, 4, 2),
    (128, 8, 2), (128, 8, 3), (64, 2, 3),
]  # fmt: skip
"""(tile, warps, stages)."""
DECODE_PROGRAMS: Final = (132, 264, 528, 1056, 2112)
PREFILL_TILES: Final = [
    (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (128, 64, 4, 3), (64, 64, 4, 3),
    (128, 32, 8, 4), (64, 128, 4, 2), (256, 64, 8, 2),
]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Try every configuration of the kernels, print the best ones, write all with --json.

    Mixtures of experts have a command of their own: `tune-moe`.
    """

    kinds: tuple[str, ...] = argument(
        "rows, memory, decode, prefill, gemm, quantized, mla-decode, mla-write or mla-extend; "
        "default: all of them.",
        metavar="[KIND]...",
        default=(),
    )
    json_file: Path | None = json_option()


def try_rows(ceilings: Ceilings, table: LineTable) -> None:
    """Norm, activation, rotation with the KV write."""
    lines = chain(
        rows.run_norm(16384, 4096, ceilings),
        rows.run_activation(8192, 14336, ceilings),
        rows.run_rope(16384, ceilings),
        rows.run_rope(16384, ceilings, True),
    )
    table.take("rows", lines)


def try_memory(ceilings: Ceilings, table: LineTable) -> None:
    """Sampling, penalties, packing."""

    def lines() -> Iterator[Line]:
        for dtype in (torch.float32, torch.bfloat16):
            for num_rows in (256, 32, 8, 1):
                sizes = (num_rows, 128256, ceilings, dtype)
                yield from memory.run_sampling(*sizes, memory.SAMPLING_TILES)
                yield from memory.run_penalties(*sizes)
        yield from memory.run_transfer(ceilings)

    table.take("memory", lines())


def try_decode(ceilings: Ceilings, table: LineTable) -> None:
    """Decode attention: every case's best configuration."""
    for case in DECODE_CASES:
        bench = DecodeBench(case)
        keep_best(table, "decode", _decode_lines(bench, ceilings))
        del bench
        torch.cuda.empty_cache()


def _decode_lines(bench: DecodeBench, ceilings: Ceilings) -> Iterator[Line]:
    expected = bench.expected()
    for tile, warps, stages in DECODE_TILES:
        for programs in DECODE_PROGRAMS:
            try:
                yield bench.run(DecodeTiles(tile, warps, stages, programs), expected, ceilings)
            except triton.runtime.errors.OutOfResources:
                break


def try_prefill(ceilings: Ceilings, table: LineTable) -> None:
    """Prefill attention: all tilings of one chunk, then the usual one of others."""

    def lines() -> Iterator[Line]:
        yield from prefill_attention.run_prefill(8192, ceilings, PREFILL_TILES)
        for length, prefix in ((2048, 6144), (8192, 24576), (1024, 0)):
            tilings = [prefill_attention.TILES]
            yield from prefill_attention.run_prefill(length, ceilings, tilings, prefix)

    table.take("prefill", lines())


def try_quantized(ceilings: Ceilings, table: LineTable) -> None:
    """Products with weights of eight bits."""
    for bits in ("int8", "fp8"):
        tune_products(ceilings, table, bits, (1, 16))


def try_mla_write(ceilings: Ceilings, table: LineTable) -> None:
    """Latents' norm, rotation and paged write."""
    sizes = ((32768, 16), (16384, 128))
    lines = chain.from_iterable(mla.run_write(*size, ceilings) for size in sizes)
    table.take("mla-write", lines)


def try_mla_extend(ceilings: Ceilings, table: LineTable) -> None:
    """Prefill over projected keys and values."""
    lines = chain(mla.run_extend(8192, 16, ceilings), mla.run_extend(2048, 16, ceilings, 6144))
    table.take("mla-extend", lines)


KINDS: Final[dict[str, Callable[[Ceilings, LineTable], None]]] = {
    "rows": try_rows,
    "memory": try_memory,
    "decode": try_decode,
    "prefill": try_prefill,
    "gemm": tune_products,
    "quantized": try_quantized,
    "mla-decode": tune_mla_decode,
    "mla-write": try_mla_write,
    "mla-extend": try_mla_extend,
}


def run(options: Options) -> None:
    """Every kind that was asked for."""
    chosen = list(options.kinds) or list(KINDS)
    if unknown := [kind for kind in chosen if kind not in KINDS]:
        raise WorkloadError(
            f"there is no kind of kernel called {unknown[0]!r}", f"choose from {', '.join(KINDS)}"
        )
    ceilings = find_ceilings(11)
    table = LineTable(ceilings)
    for kind in chosen:
        KINDS[kind](ceilings, table)
    table.finish({"kinds": chosen}, options.json_file)
