"""Sums over the GPUs of a machine: NCCL's all-reduce beside the one through peer memory.

    python engine/benchmarks/peer_sum.py [--ranks 2] [--size 4096]

Rows of bf16; microseconds per sum in a CUDA graph of many, alone and with the norm that follows.
First every sum is compared with one rank's of the same numbers, over and over, sizes by turns.
"""

import argparse
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

import torch
import torch.distributed
import torch.multiprocessing

from tandem_engine.models.collective import join_group
from tandem_engine.models.peer_memory import PeerMemory, open_peer_memory
from tandem_engine.models.shard import Shard
from tandem_kernels.norm import add_rms_norm
from tandem_kernels.peer_sum import AddNorm
from tandem_kernels.peer_sum.reference import sum_ranks

ROWS: Final = (1, 8, 32, 64, 128, 256, 512, 1024, 4096, 8192)
CALLS: Final = 40
TURNS: Final = 60


def make_graph(call: Callable[[], object], calls: int) -> torch.cuda.CUDAGraph:
    """So many calls, after two that are not in it."""
    call()
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(calls):
            call()
    return graph


def microseconds(call: Callable[[], object], calls: int) -> float:
    """Of one call, the best of some replays: what another rank does late is none of its time."""
    graph = make_graph(call, calls)
    graph.replay()
    times = []
    for _ in range(6):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.distributed.barrier()
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / calls)
    return min(times)


def count_wrong(peers: PeerMemory, shard: Shard, size: int, device: torch.device) -> int:
    """Elements that differ from the sum on one rank."""
    graphs, checks = [], []
    generator = torch.Generator(device).manual_seed(3)
    for rows in [rows for rows in ROWS if rows <= 1024]:
        shape = (shard.world_size, rows, size)
        parts = torch.randn(shape, generator=generator, device=device).to(torch.bfloat16)
        x, wrong = torch.empty_like(parts[0]), torch.zeros((), dtype=torch.int64, device=device)
        expected = sum_ranks(parts)

        def step(
            x: torch.Tensor = x,
            own: torch.Tensor = parts[shard.rank],
            expected: torch.Tensor = expected,
            wrong: torch.Tensor = wrong,
        ) -> None:
            x.copy_(own)
            peers.sum(x)
            wrong += (x != expected).sum()

        graphs.append(make_graph(step, 5))
        checks.append(wrong)
    for turn in range(TURNS):
        for graph in graphs[:: 1 if turn % 2 else -1]:
            graph.replay()
    torch.cuda.synchronize()
    return int(sum(checks).item())  # type: ignore[union-attr]


def measure(peers: PeerMemory, size: int, device: torch.device, *, shown: bool) -> None:
    """The table."""
    weight = torch.ones(size, dtype=torch.bfloat16, device=device)
    if shown:
        print("    rows      bytes      NCCL      peer   NCCL+norm  peer+norm   us")
    for rows in ROWS:
        x, residual = torch.zeros((2, rows, size), dtype=torch.bfloat16, device=device)
        norm = AddNorm(residual, weight, 1e-6, False)

        def nccl_norm(x: torch.Tensor = x, residual: torch.Tensor = residual) -> torch.Tensor:
            torch.distributed.all_reduce(x)
            return add_rms_norm(x, residual, weight, 1e-6)

        calls = CALLS if rows < 2048 else 8
        found = [
            microseconds(call, calls)
            for call in (
                partial(torch.distributed.all_reduce, x),
                partial(peers.sum, x),
                nccl_norm,
                partial(peers.sum, x, norm),
            )
        ]
        if shown:
            times = "".join(f"{time:10.1f}" for time in found)
            print(f"{rows:8d} {x.nbytes:10d}{times}", flush=True)


def run(rank: int, ranks: int, size: int, store: str) -> None:
    """One rank."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    shard = Shard(rank, ranks)
    collective = join_group(shard, store, device, size, torch.bfloat16)
    peers = open_peer_memory(shard, size, torch.bfloat16, device, ROWS[-1] * size * 2)
    if peers is None:
        print(f"rank {rank}: no peer memory", flush=True)
    else:
        with torch.inference_mode():
            wrong = count_wrong(peers, shard, size, device)
            print(f"rank {rank}: {wrong} wrong elements", flush=True)
            measure(peers, size, device, shown=rank == 0)
    collective.close()


def main() -> None:
    """Start the ranks and wait for them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--size", type=int, default=4096)
    arguments = parser.parse_args()
    os.environ.setdefault("NCCL_DEBUG", "WARN")
    with tempfile.TemporaryDirectory() as directory:
        store = str(Path(directory) / "store")
        torch.multiprocessing.spawn(run, (arguments.ranks, arguments.size, store), arguments.ranks)


if __name__ == "__main__":
    main()
