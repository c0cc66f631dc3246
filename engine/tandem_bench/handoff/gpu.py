"""KV from one GPU worker's cache to another's: what the store does alone, then the whole hand-off.

Pages of the Llama-3.1-8B shape, random blocks. P and D are two processes, as in a fleet; with one
GPU they share it. Contents are compared after every round. Beside it stands a plain copy of as many
bytes from P's GPU to D's, by one process that sees both.
"""

import mmap
import random
import time
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch

from tandem_bench.errors import CheckFailedError
from tandem_bench.gpu.device import require_gpu
from tandem_bench.handoff.nixl_gpu import time_nixl
from tandem_bench.handoff.pair import Cache, Rate, Side, measure_handoff, transports
from tandem_bench.options import option, parse_numbers
from tandem_engine.handoff.transports.nixl_agent import is_installed as agent_is_installed
from tandem_engine.runner.device_kv import DeviceKVStore
from tandem_wire.handoff import KVLayout

LAYOUT: Final = KVLayout(
    num_layers=32, num_kv_heads=8, head_dim=128, page_size=64, dtype="bfloat16", itemsize=2
)
SEED: Final = 7
NUM_SLOTS: Final = 4
"""Of nixl's ring."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """KV from one GPU worker's cache to another's: the store alone, then the whole hand-off."""

    devices: str = option("0", "GPUs of P and D, such as 0,1; one number: both share it.")
    megabytes: str = option("1024", "KV of one prompt, in MiB, such as 8,128,1024.")
    rounds: int = option(3, "Measured rounds of each case.", minimum=1)
    slot_megabytes: str = option("64", "Slots of the rings in GPU memory, in MiB, such as 16,64.")
    masked: bool = option(False, "P's process sees its own GPU only.")
    only: str = option("", "Cases whose name begins so; empty: all, and the store alone.")
    shm_dir: str = option("/dev/shm", "Folder of the shared memory, of the host.")


class DeviceCache(Cache):
    """Half of a GPU's blocks, in random order; the prefill side's hold the seed's content."""

    def __init__(self, side: Side, device: int, num_blocks: int) -> None:
        place = torch.device("cuda", device)
        torch.cuda.set_device(place)
        self.kv: DeviceKVStore = DeviceKVStore(
            LAYOUT, 2 * num_blocks, torch.bfloat16, place, shared=True
        )
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


def cases(options: Options) -> dict[str, dict[str, Any]]:
    """Settings of the hand-off by the name of the case: GPU to GPU first."""
    direct: dict[str, Any] = {"transport": "cudaIpc", "shm_dir": options.shm_dir}
    found = {"cudaIpc, checksum": direct, "cudaIpc": direct | {"checksum": False}}
    for slot in parse_numbers(options.slot_megabytes, "--slot-megabytes"):
        settings: dict[str, Any] = {
            "transport": "cudaIpcRing",
            "shm_dir": options.shm_dir,
            "device_slot_bytes": slot << 20,
        }
        found[f"cudaIpcRing, slots of {slot} MiB, checksum"] = settings
        found[f"cudaIpcRing, slots of {slot} MiB"] = settings | {"checksum": False}
        settings = {
            "transport": "nixl",
            "nixl_slot_bytes": slot << 20,
            "nixl_ring_bytes": NUM_SLOTS * slot << 20,
        }
        found[f"nixl, slots of {slot} MiB, checksum"] = settings
        found[f"nixl, slots of {slot} MiB"] = settings | {"checksum": False}
    found |= transports(options.shm_dir)
    if not options.only and not agent_is_installed():
        found = {name: case for name, case in found.items() if case["transport"] != "nixl"}
    return {name: case for name, case in found.items() if name.startswith(options.only)}


def time_peer_copy(devices: tuple[int, int], num_bytes: int, rounds: int) -> Rate:
    """One copy from P's GPU to D's, by a process that sees both.

    Raises:
        CheckFailedError: the bytes came out changed.
    """
    source, target = (
        torch.empty(num_bytes, dtype=torch.uint8, device=f"cuda:{device}") for device in devices
    )
    source.random_(0, 255)
    target.copy_(source)  # torch turns on the access of each to the other
    target.zero_()
    seconds = []
    for _ in range(rounds + 1):
        for device in devices:
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize(devices[0])
        torch.cuda.synchronize(devices[1])
        seconds.append(time.perf_counter() - started)
    if not torch.equal(source.cpu(), target.cpu()):
        raise CheckFailedError("a copy between the GPUs has changed the bytes")
    return Rate.of("plain copy", num_bytes, seconds[1:])


def show(name: str, rate: Rate, num_bytes: int, shares: dict[str, float] | None = None) -> None:
    """A line of the result; rates in GB/s, the time of a median round, its share of others."""
    milliseconds = num_bytes / rate.median / 1e3
    told = "".join(f", {100 * share:5.1f} % of {of}" for of, share in (shares or {}).items())
    print(
        f"{name:36s} best {rate.best / 1e3:6.1f}, median {rate.median / 1e3:6.1f} GB/s, "
        f"{milliseconds:8.3f} ms{told}",
        flush=True,
    )


def run(options: Options) -> None:
    """The store's own rates; then for every size a plain copy, NIXL alone, and every transport."""
    chosen = parse_numbers(options.devices, "--devices")
    require_gpu()
    devices = chosen[0], chosen[-1]
    for number, megabytes in enumerate(parse_numbers(options.megabytes, "--megabytes")):
        num_blocks = max(1, (megabytes << 20) // LAYOUT.block_bytes)
        num_bytes = num_blocks * LAYOUT.block_bytes
        print(f"KV of {num_blocks * LAYOUT.page_size} tokens, {num_bytes} bytes", flush=True)
        if number == 0 and not options.only:
            time_store(devices[0], num_blocks)
        found = cases(options)
        alone = [time_peer_copy(devices, num_bytes, 3 * options.rounds)]
        torch.cuda.empty_cache()
        if any(case["transport"] == "nixl" for case in found.values()):
            alone.append(time_nixl(devices, num_bytes, 3 * options.rounds))
        for rate in alone:
            show(rate.name, rate, num_bytes)
        seen = str(devices[0]) if options.masked else ""
        make = partial(make_cache, (0 if options.masked else devices[0], devices[1]), num_blocks)
        for name, settings in found.items():
            rate = measure_handoff(name, make, options.rounds, settings, visible_gpus=seen)
            show(name, rate, num_bytes, {other.name: rate.median / other.median for other in alone})
