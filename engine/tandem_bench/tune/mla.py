"""Configurations of MLA's decode kernel: which to try, which work, and the fastest of them."""

from collections.abc import Iterator
from typing import Final

import torch
import triton

from tandem_bench.errors import WrongResultError
from tandem_bench.gpu.device import Ceilings
from tandem_bench.gpu.lines import Line, LineTable
from tandem_bench.gpu.timing import check
from tandem_bench.kernels.mla import CASES, MlaBench, MlaCase, MlaTiles
from tandem_bench.terminal import results
from tandem_bench.tune.search import in_processes, keep_best
from tandem_kernels.mla.decode_kernel import Kind

DecodeConfig = tuple[int, int, int, Kind]
"""(tile, warps, stages, kind)."""

FEW_HEADS: list[DecodeConfig] = [
    (64, 4, 2, "columns"),
    (64, 8, 2, "columns"),
    (128, 8, 1, "columns"),
    (32, 4, 4, "columns"),
    (32, 4, 3, "columns"),
    (32, 8, 4, "rows"),
    (32, 4, 2, "rows"),
    (16, 4, 4, "rows"),
]
MANY_HEADS: list[DecodeConfig] = [
    (64, 8, 2, "hopper"),
    (64, 8, 2, "rows"),
    (32, 8, 3, "rows"),
    (32, 8, 4, "rows"),
    (64, 8, 2, "columns"),
]


def configurations(case: MlaCase) -> list[DecodeConfig]:
    """What is worth trying for a case."""
    if case.heads > 32:
        return MANY_HEADS
    return FEW_HEADS if case.page == 64 else FEW_HEADS[:2]


def _try_decode(job: tuple[int, int, DecodeConfig]) -> str:
    """In a process of its own, for a wrong kernel can end it: whether it works."""
    heads, page, (tile, warps, stages, kind) = job
    case = MlaCase(1, 4096, heads, page)
    bench = MlaBench(case, num_layers=1)
    try:
        bench.out.fill_(float("nan"))
        found = bench.prepare(MlaTiles(tile, warps, stages, 132, kind))(0)
        check(case.name, found, bench.expected, 2e-2)
    except (RuntimeError, WrongResultError, triton.runtime.errors.OutOfResources) as error:
        return f"fails: {str(error).splitlines()[0]}"
    return "works"


def try_decode(num_processes: int = 16) -> dict[tuple[int, int, DecodeConfig], str]:
    """Compile every configuration, in parallel, and see which work."""
    kinds = {(case.heads, case.page): case for case in CASES}
    jobs = [(*kind, tiles) for kind, case in kinds.items() for tiles in configurations(case)]
    notes = dict(
        zip(jobs, in_processes(_try_decode, jobs, num_processes, tasks_each=1), strict=True)
    )
    for job, note in notes.items():
        results.print(*job, note, soft_wrap=True, markup=False)
    return notes


def tune_decode(ceilings: Ceilings, table: LineTable) -> None:
    """Every case's best configuration."""
    notes = try_decode()
    for case in CASES:
        works = [
            config
            for config in configurations(case)
            if not notes[case.heads, case.page, config].startswith("fails")
        ]
        bench = MlaBench(case)
        keep_best(table, "mla-decode", _decode_lines(bench, works, ceilings))
        del bench
        torch.cuda.empty_cache()


def _decode_lines(
    bench: MlaBench, configs: list[DecodeConfig], ceilings: Ceilings
) -> Iterator[Line]:
    for tile, warps, stages, kind in configs:
        for programs, least in ONE_SEQUENCE if bench.case.batch == 1 else MANY_SEQUENCES:
            tiles = MlaTiles(tile, warps, stages, programs, kind, least, overlap=True)
            yield bench.run(tiles, ceilings)


ONE_SEQUENCE: Final = ((132, 1), (132, 2), (132, 4))
"""(programs aimed at, the smallest split)."""
MANY_SEQUENCES: Final = ((64, 1), (132, 1), (264, 1))
