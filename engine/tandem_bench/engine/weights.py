"""How fast weights come onto a device: a Llama-8B-shaped checkpoint by threads and buffer sizes.

Writes random bf16 shards to the directory (if they aren't there), loads them, and first checks that
what arrived are the bytes of the files. Then: the rate by number of threads and size of buffers,
from files dropped from the page cache, and of mapping them instead; a rank's slice; random weights
made on the device; the memory that is left in use. The directory stays for `startup`.
"""

import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from tandem_bench.errors import CheckFailedError
from tandem_bench.options import option
from tandem_bench.shapes import named_config
from tandem_engine.models.parameters import Parameter, build_parameters
from tandem_engine.models.shard import WHOLE, Shard
from tandem_engine.spec.families import build_spec
from tandem_engine.spec.model import ModelSpec
from tandem_engine.startup import boot_seconds, process_start
from tandem_engine.weights.loading import WeightFiles, load_parameters
from tandem_engine.weights.parameter_file import write_parameters
from tandem_engine.weights.random_source import make_random_parameters
from tandem_engine.weights.safetensors_dir import SafetensorsDirectory, find_places
from tandem_engine.weights.streaming import Staging, stream_parameters
from tandem_wire.model_config import read_model_facts

NUM_SHARDS = 4
SETTINGS = (
    *((8, 16), (16, 16), (4, 16), (8, 4), (8, 64)),
    *((16, 4), (12, 16), (2, 16), (1, 16), (8, 16)),
)
"""Numbers of threads, and MiB of each of their two buffers; the most telling first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How fast weights come onto a device: a Llama-8B-shaped checkpoint."""

    directory: Path | None = option(
        None, "Where the checkpoint is, or is written and stays; default: a temporary folder."
    )
    layers: int = option(32, "Layers of the model.")
    device: str = option("cuda", "`cuda` or `cpu`.")
    seconds: float = option(600.0, "No measurement starts after this time.")


def write_checkpoint(directory: Path, spec: ModelSpec, device: torch.device) -> None:
    """Random bf16 tensors in shards with an index, as the hub has them."""
    names = [
        (name, shape)
        for parameter in build_parameters(spec)
        for name, shape in zip(parameter.parts, parameter.part_shapes, strict=True)
    ]
    weight_map: dict[str, str] = {}
    for shard in range(NUM_SHARDS):
        mine = dict(
            names[shard * len(names) // NUM_SHARDS : (shard + 1) * len(names) // NUM_SHARDS]
        )
        file = f"model-{shard + 1:05}-of-{NUM_SHARDS:05}.safetensors"
        weight_map |= dict.fromkeys(mine, file)
        layout = {name: (shape, torch.bfloat16) for name, shape in mine.items()}
        tensors = (
            (name, (0.02 * torch.randn(shape, dtype=torch.bfloat16, device=device)).cpu())
            for name, shape in mine.items()
        )
        write_parameters(directory / file, layout, tensors)
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))


def timed(device: torch.device, load: Callable[[], dict[str, torch.Tensor]]) -> tuple[float, int]:
    """Seconds until the tensors are there, and their bytes; they are freed again."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
    began = time.perf_counter()
    tensors = load()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began, sum(tensor.nbytes for tensor in tensors.values())


def check(directory: Path, spec: ModelSpec, device: torch.device) -> None:
    """Every parameter on the device holds exactly the bytes of the files."""
    files = WeightFiles(directory, "Safetensors")
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    found = load_parameters(spec, files, torch.bfloat16, directory, device=device)
    print(f"first load {time.perf_counter() - began:.2f} s", flush=True)
    source = SafetensorsDirectory(directory)
    parameters = build_parameters(spec)
    chosen = dict.fromkeys(parameters[:12] + parameters[-12:])
    for parameter in chosen:
        expected = torch.cat([source.load(part) for part in parameter.parts])
        if not torch.equal(found[parameter.name].cpu(), expected):
            raise CheckFailedError(f"{parameter.name} came onto the device changed")
    print(f"checked: {len(found)} parameters, the bytes of {len(chosen)} of them", flush=True)
    if device.type == "cuda":
        total = sum(tensor.nbytes for tensor in found.values())
        peak, now = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
        mib = 1 << 20
        print(
            f"device memory: model {total / mib:.1f} MiB, peak {(peak - total) / mib:+.1f}, "
            f"left {(now - total) / mib:+.1f}, reserved {torch.cuda.memory_reserved() / mib:.1f}",
            flush=True,
        )


def drop_page_cache(directory: Path) -> None:
    """Drop the files from the page cache; they were written, so they are synced first."""
    os.sync()
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Clock:
    """Measures and prints a line, unless the time is up."""

    def __init__(self, device: torch.device, end: float) -> None:
        self._device = device
        self._end = end

    def line(self, name: str, load: Callable[[], dict[str, torch.Tensor]]) -> None:
        """One measured load."""
        if time.perf_counter() > self._end:
            print(f"{name:34} not measured: the time was up", flush=True)
            return
        seconds, size = timed(self._device, load)
        rate = size / seconds / 1e9
        print(f"{name:34} {seconds:6.2f} s {rate:6.2f} GB/s ({size / 1e9:.2f} GB)", flush=True)


def measure(directory: Path, spec: ModelSpec, device: torch.device, end: float) -> None:
    """Print a line per setting."""
    parameters, places = build_parameters(spec), find_places(directory)
    clock = Clock(device, end)

    def stream(staging: Staging, shard: Shard = WHOLE) -> dict[str, torch.Tensor]:
        return stream_parameters(
            parameters, places, torch.bfloat16, device, shard=shard, staging=staging
        )

    for num_threads, mib in SETTINGS:
        name = f"{num_threads:2} threads, 2 x {mib:2} MiB each"
        clock.line(name, partial(stream, Staging(num_threads, mib << 20)))
    for name in ("first", "again"):
        clock.line(
            f"Dummy, {name}",
            partial(make_random_parameters, parameters, torch.bfloat16, device),
        )
    for world in (2, 8):
        clock.line(f"slice {world} of {world}", partial(stream, Staging(), Shard(world - 1, world)))
    clock.line(
        "allocation alone",
        lambda: {
            parameter.name: torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
            for parameter in parameters
        },
    )
    clock.line(
        "a quarter mapped, joined, moved", lambda: map_and_move(directory, parameters, device)
    )
    drop_page_cache(directory)
    clock.line("dropped from the page cache", partial(stream, Staging()))


def map_and_move(
    directory: Path, parameters: list[Parameter], device: torch.device
) -> dict[str, torch.Tensor]:
    """What the streamer replaces: join on the CPU, then copy from pageable memory."""
    source = SafetensorsDirectory(directory)
    return {
        parameter.name: torch.cat([source.load(part) for part in parameter.parts]).to(device)
        for parameter in parameters[: len(parameters) // 4]
    }


def run(options: Options) -> None:
    """Check, measure, print."""
    end = time.perf_counter() + options.seconds
    print(f"Python, torch and ours imported in {boot_seconds() - process_start():.1f} s")
    device = torch.device(options.device)
    with tempfile.TemporaryDirectory(prefix="tandem-weights-") as temporary:
        directory = options.directory or Path(temporary)
        config = {**(named_config("llama-8b") or {}), "num_hidden_layers": options.layers}
        (directory / "config.json").write_text(json.dumps(config))
        spec = build_spec(read_model_facts(directory))
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        print(f"{name}, {os.cpu_count()} CPUs, torch {torch.__version__}, {sys.version.split()[0]}")
        began = time.perf_counter()
        if not (directory / "model.safetensors.index.json").exists():
            write_checkpoint(directory, spec, device)
        print(f"checkpoint written in {time.perf_counter() - began:.1f} s", flush=True)
        check(directory, spec, device)
        measure(directory, spec, device, end)
        if device.type == "cuda":
            print(f"device memory in use at the end: {torch.cuda.memory_allocated()} bytes")
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        print(f"largest resident size of this process: {used} MiB (mapped files included)")
