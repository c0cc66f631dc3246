"""Every kernel in its shipped configuration beside the floor of the same call."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tandem_bench.errors import WorkloadError
from tandem_bench.gpu.device import Ceilings, find_ceilings
from tandem_bench.gpu.lines import Line, LineTable
from tandem_bench.options import json_option, option

GEMM_ROWS: Final = (1, 16, 32, 64)

Stage = Callable[[Ceilings], Iterator[Line]]
"""Checks, measures, and yields lines as they come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Every kernel against the floor that this GPU's own copy and matmul rates allow.

    Each is checked against its reference first; no time is reported for a wrong result.
    """

    only: str = option(
        "", "Only these, with commas: rows, attention, prefill, memory, gemm, moe, mla."
    )
    json_file: Path | None = json_option()


def _rows(ceilings: Ceilings) -> Iterator[Line]:
    from tandem_bench.kernels import rows

    yield from rows.run_norm(16384, 4096, ceilings)
    yield from rows.run_activation(8192, 14336, ceilings)
    yield from rows.run_rope(16384, ceilings)
    yield from rows.run_rope(16384, ceilings, True)


def _memory(ceilings: Ceilings) -> Iterator[Line]:
    from tandem_bench.kernels import memory

    for num_rows in (1, 256):
        yield from memory.run_sampling(num_rows, 128256, ceilings)
        yield from memory.run_penalties(num_rows, 128256, ceilings)
    yield from memory.run_transfer(ceilings)


def _decode(ceilings: Ceilings) -> Iterator[Line]:
    import torch

    from tandem_bench.kernels.decode_attention import DECODE_CASES, DecodeBench, DecodeTiles

    # As the engine's backend has it. Tiles of 8-bit values are half as large, and take twice as
    # many programs as there are multiprocessors to keep the memory busy.
    count = torch.cuda.get_device_properties(0).multi_processor_count
    for case in DECODE_CASES:
        bench = DecodeBench(case)
        small = case.dtype.itemsize == 1
        programs, stages = (2 * count, 4) if small else (None, None)
        tiles = DecodeTiles(programs=programs, stages=stages)
        yield bench.run(tiles, bench.expected(), ceilings)
        del bench
        torch.cuda.empty_cache()


def _prefill(ceilings: Ceilings) -> Iterator[Line]:
    from tandem_bench.kernels.prefill_attention import TILES, run_prefill, run_prompts

    for length, prefix in ((1024, 0), (2048, 0), (8192, 0), (2048, 6144), (8192, 24576)):
        yield from run_prefill(length, ceilings, [TILES], prefix)
    for count, length in ((16, 560), (16, 100)):
        yield from run_prompts(count, length, ceilings)


def _gemm(ceilings: Ceilings) -> Iterator[Line]:
    import torch

    from tandem_bench.kernels.gemm import LLAMA_8B, GemmBench

    for shape in LLAMA_8B:
        bench = GemmBench(shape)
        for num_rows in GEMM_ROWS:
            yield bench.run_torch(num_rows, ceilings)
            yield bench.run_shipped(num_rows, ceilings)
        del bench
        torch.cuda.empty_cache()


def _moe(ceilings: Ceilings) -> Iterator[Line]:
    import torch

    from tandem_bench.kernels.moe import SHAPES, TOKENS, MoeBench
    from tandem_kernels.moe.kernel import MOST_OVERLAPPED

    for shape in SHAPES:
        bench = MoeBench(shape)
        for tokens in TOKENS:
            yield bench.run(tokens, ceilings, overlap=tokens <= MOST_OVERLAPPED)
        del bench
        torch.cuda.empty_cache()


def _mla(ceilings: Ceilings) -> Iterator[Line]:
    import torch

    from tandem_bench.kernels import mla

    for case in mla.CASES:
        bench = mla.MlaBench(case)
        yield bench.run(None, ceilings)
        del bench
        torch.cuda.empty_cache()
    yield from mla.run_write(32768, 16, ceilings)
    yield from mla.run_write(16384, 128, ceilings)
    yield from mla.run_extend(8192, 16, ceilings)


STAGES: Final[dict[str, Stage]] = {
    "rows": _rows,
    "attention": _decode,
    "prefill": _prefill,
    "memory": _memory,
    "gemm": _gemm,
    "moe": _moe,
    "mla": _mla,
}


def choose_stages(names: str) -> dict[str, Stage]:
    """The stages in a comma-separated list, or all of them for an empty one."""
    wanted = [name.strip() for name in names.split(",") if name.strip()] or list(STAGES)
    unknown = [name for name in wanted if name not in STAGES]
    if unknown:
        raise WorkloadError(
            f"there is no kernel benchmark called {unknown[0]!r}",
            f"choose from {', '.join(STAGES)}",
        )
    return {name: STAGES[name] for name in wanted}


def run(options: Options) -> None:
    """Every chosen stage."""
    stages = choose_stages(options.only)
    ceilings = find_ceilings()
    table = LineTable(ceilings)
    for name, stage in stages.items():
        table.take(name, stage(ceilings))
    table.finish({"only": options.only}, options.json_file)
