"""KV from one GPU worker's cache to another's: what the store does alone, then the whole hand-off.

Pages of the Llama-3.1-8B shape, random blocks. P and D are two processes, as in a fleet; with one
GPU they share it. Contents are compared after every case.
"""

import mmap
import random
import time
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch

from tandem_bench.errors import CheckFailedError
from tandem_bench.gpu.device import require_gpu
from tandem_bench.handoff.pair import Cache, Side, measure_handoff, transports
from tandem_bench.options import option, parse_numbers
from tandem_engine.runner.device_kv import DeviceKVStore
from tandem_wire.handoff import KVLayout

LAYOUT: Final = KVLayout(
    num_layers=32, num_kv_heads=8, head_dim=128, page_size=64, dtype="bfloat16", itemsize=2
)
SEED: Final = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """KV from one GPU worker's cache to another's: the store alone, then the whole hand-off."""

    devices: str = option("0", "GPUs of P and D, such as 0,1; one number: both share it.")
    megabytes: int = option(1024, "KV of one prompt, in MiB.", minimum=32)
    rounds: int = option(3, "Measured rounds of each case.", minimum=1)
    shm_dir: str = option("/dev/shm", "Folder of the shared memory.")


class DeviceCache(Cache):
    """Half of a GPU's blocks, in random order; the prefill side's hold the seed's content."""

    def __init__(self, side: Side, device: int, num_blocks: int) -> None:
        place = torch.device("cuda", device)
        torch.cuda.set_device(place)
        self.kv: DeviceKVStore = DeviceKVStore(LAYOUT, 2 * num_blocks, torch.bfloat16, place)
        self.sent, self.blocks = (chosen_blocks(num_blocks, seed) for seed in (1, 2))
        if side == "prefill":
            self.blocks = self.sent
            fill(self.kv.cache)

    def clear(self) -> None:
        self.kv.cache.zero_()
        torch.cuda.synchronize()

    def is_right(self) -> bool:
        expected = torch.empty_like(self.kv.cache)
        fill(expected)
        found = self.kv.cache[:, :, list(self.blocks)]
        return torch.equal(found, expected[:, :, list(self.sent)])


def fill(cache: torch.Tensor) -> None:
    """Layer by layer, from the seed: the same content on every device."""
    generator = torch.Generator(cache.device).manual_seed(SEED)
    for layer in cache:
        layer.normal_(generator=generator)
    torch.cuda.synchronize(cache.device)


def chosen_blocks(num_blocks: int, seed: int) -> tuple[int, ...]:
    """Half of the cache, in random order."""
    return tuple(random.Random(seed).sample(range(2 * num_blocks), num_blocks))


def make_cache(devices: tuple[int, int], num_blocks: int, side: Side) -> Cache:
    """One side's cache, on its device."""
    return DeviceCache(side, devices[0 if side == "prefill" else 1], num_blocks)


def time_store(device: int, num_blocks: int) -> None:
    """Exports into and imports from memory of the host, in one thread."""
    source, target = (DeviceCache(side, device, num_blocks) for side in ("prefill", "decode"))
    for megabytes, pinned in ((1, False), (1, True), (8, False), (8, True), (32, True)):
        export_seconds, import_seconds = time_pieces(source, target, megabytes, pinned=pinned)
        moved = num_blocks * LAYOUT.block_bytes / 1e9
        print(
            f"pieces of {megabytes:2d} MiB, host memory {'' if pinned else 'not '}locked: export"
            f" {moved / export_seconds:5.1f} GB/s, import {moved / import_seconds:5.1f} GB/s",
            flush=True,
        )
    if not target.is_right():
        raise CheckFailedError("the store's KV came out changed")


def time_pieces(
    source: DeviceCache, target: DeviceCache, megabytes: int, *, pinned: bool
) -> tuple[float, float]:
    """Seconds of the exports and of the imports, piece by piece."""
    layers = min(LAYOUT.num_layers, max(1, (megabytes << 20) // LAYOUT.layer_bytes))
    step = max(1, (megabytes << 20) // LAYOUT.block_bytes)
    room = mmap.mmap(-1, step * LAYOUT.block_bytes)
    seconds = [0.0, 0.0]
    with memoryview(room) as view:
        unpin = source.kv.pin(view) if pinned else lambda: None
        for start in range(0, len(source.blocks), step):
            for first in range(0, LAYOUT.num_layers, layers):
                some = range(first, min(first + layers, LAYOUT.num_layers))
                with view[: step * len(some) * LAYOUT.layer_bytes] as part:
                    t0 = time.perf_counter()
                    source.kv.export_into(source.blocks[start : start + step], some, part)
                    t1 = time.perf_counter()
                    target.kv.import_blocks(target.blocks[start : start + step], some, part)
                    t2 = time.perf_counter()
                seconds[0] += t1 - t0
                seconds[1] += t2 - t1
        unpin()
    room.close()
    return seconds[0], seconds[1]


def run(options: Options) -> None:
    """The store's own rates, then every transport."""
    devices = parse_numbers(options.devices, "--devices")
    require_gpu()
    num_blocks = (options.megabytes << 20) // LAYOUT.block_bytes // 4 * 4
    time_store(devices[0], num_blocks)
    torch.cuda.empty_cache()
    make = partial(make_cache, (devices[0], devices[-1]), num_blocks)
    for name, settings in transports(options.shm_dir).items():
        rate = measure_handoff(name, make, options.rounds, settings)
        print(
            f"{name:15s} best {rate.best / 1e3:5.1f}, median {rate.median / 1e3:5.1f} GB/s",
            flush=True,
        )
