"""NIXL by itself from GPU to GPU: one write of all bytes, from one process to another.

Memory is registered once; nothing is packed, checked or unpacked.
"""

import time
from functools import partial

import torch

from tandem_bench.errors import CheckFailedError
from tandem_bench.handoff.beside import Pipe, running_target
from tandem_bench.handoff.pair import Rate
from tandem_engine.handoff.transports.nixl_agent import Agent
from tandem_engine.memory import MemoryRegion

_PATTERN = 0x5A


class _GpuMemory:
    """An agent of the library, and memory of a GPU that is registered with it."""

    def __init__(self, name: str, device: int, num_bytes: int, value: int) -> None:
        torch.cuda.set_device(device)
        self._bytes = torch.full((num_bytes,), value, dtype=torch.uint8, device=f"cuda:{device}")
        torch.cuda.synchronize()
        self.region = MemoryRegion("cuda", self._bytes.data_ptr(), num_bytes, device)
        self.agent = Agent(f"bench-{name}")
        self.described = self.agent.describe(self.agent.register(self.region))

    def is_filled(self) -> bool:
        """Whether all of it is the pattern."""
        torch.cuda.synchronize()
        return bool((self._bytes == _PATTERN).all())


def _be_target(pipe: Pipe, num_bytes: int, device: int) -> None:
    memory = _GpuMemory("target", device, num_bytes, 0)
    pipe.send((memory.described, memory.region))
    pipe.recv()
    pipe.send(memory.is_filled())


def _pause(seconds: float) -> bool:
    time.sleep(seconds)
    return False


def time_nixl(devices: tuple[int, int], num_bytes: int, rounds: int) -> Rate:
    """One write of all bytes. Raises CheckFailedError when they did not arrive."""
    be_target = partial(_be_target, device=devices[1])
    with running_target(be_target, num_bytes, "NIXL") as (described, target):
        memory = _GpuMemory("source", devices[0], num_bytes, _PATTERN)
        peer = memory.agent.add(described)
        seconds = []
        for _ in range(rounds + 1):
            started = time.perf_counter()
            if not memory.agent.write(peer, memory.region, target, _pause):
                raise CheckFailedError("NIXL's own write was not made")
            seconds.append(time.perf_counter() - started)
    return Rate.of("NIXL alone", num_bytes, seconds[1:])
