"""KV from one GPU worker's cache to another's: what the store does alone, then the whole hand-off.

    python engine/benchmarks/gpu_handoff.py [--devices 0,1] [--megabytes 1024] [--shm-dir /dev/shm]

Pages of the Llama-3.1-8B shape, random blocks. P and D are two processes, as in a fleet; with one
GPU they share it. Contents are compared after every case.
"""

import argparse
import mmap
import multiprocessing
import random
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

import torch

from tandem_engine.handoff.bench import fetch
from tandem_engine.handoff.events import PrefillArrived, PushChunk
from tandem_engine.handoff.service import HandoffService, start_handoff
from tandem_engine.handoff.settings import HandoffSettings
from tandem_engine.runner.device_kv import DeviceKVStore
from tandem_wire.handoff import KVLayout

LAYOUT = KVLayout(
    num_layers=32, num_kv_heads=8, head_dim=128, page_size=64, dtype="bfloat16", itemsize=2
)
SEED = 7


def make_store(device: int, num_blocks: int, *, filled: bool) -> DeviceKVStore:
    """A cache with twice the blocks; a filled one has the same content on every device."""
    place = torch.device("cuda", device)
    torch.cuda.set_device(place)
    store = DeviceKVStore(LAYOUT, 2 * num_blocks, torch.bfloat16, place)
    if filled:
        fill(store.cache)
    return store


def fill(cache: torch.Tensor) -> None:
    """Layer by layer, from the seed."""
    generator = torch.Generator(cache.device).manual_seed(SEED)
    for layer in cache:
        layer.normal_(generator=generator)
    torch.cuda.synchronize(cache.device)


def chosen_blocks(num_blocks: int, seed: int) -> list[int]:
    """Half of the cache, in random order."""
    return random.Random(seed).sample(range(2 * num_blocks), num_blocks)


def check(store: DeviceKVStore, num_blocks: int) -> None:
    """Compare what has arrived with what was sent."""
    expected = torch.empty_like(store.cache)
    fill(expected)
    found = store.cache[:, :, chosen_blocks(num_blocks, 2)]
    if not torch.equal(found, expected[:, :, chosen_blocks(num_blocks, 1)]):
        raise SystemExit("the KV came out changed")


def time_store(device: int, num_blocks: int) -> None:
    """Exports into and imports from memory of the host, in one thread."""
    source, target = (make_store(device, num_blocks, filled=filled) for filled in (True, False))
    size = LAYOUT.block_bytes
    for megabytes, pinned in ((1, False), (1, True), (8, False), (8, True), (32, True)):
        layers = min(LAYOUT.num_layers, max(1, (megabytes << 20) // LAYOUT.layer_bytes))
        step = max(1, (megabytes << 20) // size)
        room = mmap.mmap(-1, step * size)
        seconds = [0.0, 0.0]
        with memoryview(room) as view:
            unpin = source.pin(view) if pinned else lambda: None
            blocks = [chosen_blocks(num_blocks, seed) for seed in (1, 2)]
            for start in range(0, num_blocks, step):
                for first in range(0, LAYOUT.num_layers, layers):
                    some = range(first, min(first + layers, LAYOUT.num_layers))
                    with view[: step * len(some) * LAYOUT.layer_bytes] as part:
                        t0 = time.perf_counter()
                        source.export_into(blocks[0][start : start + step], some, part)
                        t1 = time.perf_counter()
                        target.import_blocks(blocks[1][start : start + step], some, part)
                        t2 = time.perf_counter()
                    seconds[0] += t1 - t0
                    seconds[1] += t2 - t1
            unpin()
        room.close()
        moved = num_blocks * size / 1e9
        print(
            f"pieces of {megabytes:2d} MiB, host memory {'' if pinned else 'not '}locked:"
            f" export {moved / seconds[0]:5.1f} GB/s, import {moved / seconds[1]:5.1f} GB/s",
            flush=True,
        )
    check(target, num_blocks)


def start_side(name: str, store: DeviceKVStore, options: dict[str, Any]) -> HandoffService:
    """One worker's hand-off."""
    settings = HandoffSettings(worker_id=name, boot_id="bench", host="127.0.0.1", **options)
    return start_handoff(settings, store, "bench")


def prefill_side(
    pipe: "Connection[int | None, int | None]", device: int, num_blocks: int, options: Any
) -> None:
    """P: pushes the same blocks to whoever asks."""
    handoff = start_side("p", make_store(device, num_blocks, filled=True), options)
    wake = threading.Event()
    handoff.wake_on_event(wake)
    pipe.send(handoff.bootstrap_port)
    blocks = tuple(chosen_blocks(num_blocks, 1))
    while not pipe.poll(0):
        wake.wait(0.05)
        wake.clear()
        for event in handoff.poll():
            if isinstance(event, PrefillArrived):
                tokens = len(event.request.tokens)
                handoff.post(PushChunk(event.key, 0, tokens, blocks, last=True, first_token=1))
    handoff.close()


def time_handoff(
    name: str, devices: list[int], num_blocks: int, rounds: int, **options: Any
) -> None:
    """Fetches from a second process, of which the first is not counted."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=prefill_side, args=(theirs, devices[0], num_blocks, options))
    child.start()
    store = make_store(devices[-1], num_blocks, filled=False)
    handoff = start_side("d", store, options)
    wake = threading.Event()
    handoff.wake_on_event(wake)
    port = ours.recv()
    assert port is not None
    blocks = chosen_blocks(num_blocks, 2)
    seconds = []
    for number in range(rounds + 1):
        store.cache.zero_()
        torch.cuda.synchronize()
        seconds.append(fetch(handoff, wake, f"r{number}", port, blocks, LAYOUT.page_size))
        check(store, num_blocks)
    ours.send(None)
    handoff.close()
    child.join()
    rates = sorted(num_blocks * LAYOUT.block_bytes / second / 1e9 for second in seconds[1:])
    print(
        f"{name:15s} best {rates[-1]:5.1f}, median {rates[len(rates) // 2]:5.1f} GB/s", flush=True
    )


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", default="0", help="of P and D; one: both share it")
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shm-dir", default="/dev/shm")
    arguments = parser.parse_args()
    devices = [int(number) for number in arguments.devices.split(",")]
    num_blocks = (arguments.megabytes << 20) // LAYOUT.block_bytes // 4 * 4
    time_store(devices[0], num_blocks)
    torch.cuda.empty_cache()
    shm: dict[str, Any] = {"transfer": "shm", "shm_dir": arguments.shm_dir}
    cases: dict[str, dict[str, Any]] = {
        "shm, checksum": shm,
        "shm": shm | {"checksum": False},
        "tcp, checksum": {"transfer": "tcp"},
        "tcp": {"transfer": "tcp", "checksum": False},
    }
    for name, options in cases.items():
        time_handoff(name, devices, num_blocks, arguments.rounds, **options)


if __name__ == "__main__":
    main()
