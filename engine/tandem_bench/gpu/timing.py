"""Timing on the device: calls are captured in one CUDA graph, which leaves launches out."""

import statistics
from collections.abc import Callable, Sequence

import torch

from tandem_bench.errors import WrongResultError

Call = Callable[[], object]


def seconds_per_call(calls: Sequence[Call], repeats: int = 15) -> float:
    """Median over replays of one graph of all `calls`, divided by their number.

    Give calls on different buffers, several times the L2 in all, or the cache is what is measured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    return seconds_eager(graph.replay, repeats) / len(calls)


def seconds_eager(call: Call, repeats: int = 15) -> float:
    """Median by the device's clock, without a graph: for calls that outlast their launch by far."""
    times: list[float] = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3)
    return statistics.median(times)


def check(name: str, found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> float:
    """Relative error ‖found − expected‖ / ‖expected‖.

    Raises:
        WrongResultError: it is not below the tolerance (or is NaN).
    """
    error = float((found.float() - expected.float()).norm() / expected.float().norm())
    if not error < tolerance:
        raise WrongResultError(f"{name}: relative error {error}, at most {tolerance} is allowed")
    return error
