"""A model's parameters from its files, by the cheapest way there is."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Final, Literal

import torch
import xxhash

from tandem_engine.models.parameters import Parameter, build_parameters
from tandem_engine.models.shard import WHOLE, Shard
from tandem_engine.spec.model import ModelSpec
from tandem_engine.weights.parameter_file import map_parameters, split_fused, write_parameters
from tandem_engine.weights.random_source import RandomSource, make_random_parameters
from tandem_engine.weights.safetensors_header import read_header
from tandem_engine.weights.source import Progress, iterate_parameters
from tandem_engine.weights.streaming import stream_parameters
from tandem_wire.disk_cache import build_once
from tandem_wire.gguf_file import read_gguf

ROPE_FACTORS = "rope_factors"
"""Extra entry of the parameters: divisors of the rope's frequencies, from GGUF files only."""

CPU: Final = torch.device("cpu")
_CACHE_VERSION: Final = 2


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """Where the weights are: a directory, a GGUF file, or nowhere (random ones)."""

    path: Path
    format: Literal["Safetensors", "Gguf", "Dummy"]


def load_parameters(
    spec: ModelSpec,
    files: WeightFiles,
    dtype: torch.dtype,
    cache_dir: Path,
    progress: Progress | None = None,
    *,
    device: torch.device = CPU,
    shard: Shard = WHOLE,
) -> dict[str, torch.Tensor]:
    """All parameters of the model, or a rank's slice of each, on `device`, by our names.

    On the CPU they are views of the mapped files where that is possible; to a GPU they are streamed
    (`streaming.py`). GGUF files are dequantised once per machine and dtype, into `cache_dir`, and
    loaded from there.

    Raises:
        ModelSourceError: damaged, incomplete or unsupported files.
        ConfigError: the model can't be divided among that many ranks.
    """
    parameters = build_parameters(spec)
    if files.format == "Gguf":
        return _load_gguf(spec, files.path, parameters, dtype, cache_dir, progress, device, shard)
    on_cpu = device.type == "cpu"
    if files.format == "Dummy":
        if not on_cpu:
            return make_random_parameters(parameters, dtype, device, shard)
        source = RandomSource(parameters)
        return dict(iterate_parameters(parameters, source, dtype, progress, shard))
    from tandem_engine.weights.safetensors_dir import SafetensorsDirectory, find_places

    if not on_cpu:
        places = find_places(files.path)
        return stream_parameters(parameters, places, dtype, device, progress, shard)
    directory = SafetensorsDirectory(files.path)
    return dict(iterate_parameters(parameters, directory, dtype, progress, shard))


def _load_gguf(
    spec: ModelSpec,
    path: Path,
    parameters: list[Parameter],
    dtype: torch.dtype,
    cache_dir: Path,
    progress: Progress | None,
    device: torch.device,
    shard: Shard,
) -> dict[str, torch.Tensor]:
    mapped = device.type == "cpu" and shard == WHOLE
    advance = progress if mapped or progress is None else _forwards(progress)
    cached = _dequantised(spec, path, parameters, dtype, cache_dir, advance)
    if mapped:
        return map_parameters(cached)
    places = read_header(cached)
    # Our own file holds the parameters whole, with everything added that is to be added.
    parts = {
        part: place
        for parameter in parameters
        for part, place in split_fused(parameter, places[parameter.name])
    }
    final = [replace(parameter, offset=0.0) for parameter in parameters]
    found = stream_parameters(final, parts, dtype, device, advance, shard)
    if ROPE_FACTORS in places:
        found[ROPE_FACTORS] = map_parameters(cached)[ROPE_FACTORS].to(device)
    return found


def _forwards(progress: Progress) -> Progress:
    """`progress` for two passes over the same bytes: it never goes back."""
    furthest = 0.0

    def advance(fraction: float) -> None:
        nonlocal furthest
        furthest = max(furthest, fraction)
        progress(furthest)

    return advance


def _dequantised(
    spec: ModelSpec,
    path: Path,
    parameters: list[Parameter],
    dtype: torch.dtype,
    cache_dir: Path,
    progress: Progress | None,
) -> Path:
    """The cached file with the parameters of a GGUF file, made now if it isn't there."""

    def build(target: Path) -> None:
        # Imported here: a warm start doesn't need to know how to dequantise.
        from tandem_engine.weights.gguf_source import GgufSource

        source = GgufSource(read_gguf(path), spec)
        layout = {
            parameter.name: (parameter.shape, parameter.dtype_in(dtype)) for parameter in parameters
        }
        tensors: Iterator[tuple[str, torch.Tensor]] = iterate_parameters(
            parameters, source, dtype, progress
        )
        factors = source.rope_factors()
        if factors is not None:
            layout[ROPE_FACTORS] = (tuple(factors.shape), torch.float32)
            tensors = chain(tensors, [(ROPE_FACTORS, factors)])
        write_parameters(target, layout, tensors)

    status = path.stat()
    identity = (path.resolve(), status.st_size, status.st_mtime_ns, str(dtype), _CACHE_VERSION)
    key = xxhash.xxh3_64_hexdigest(repr(identity).encode())
    folder = cache_dir / "weights"
    return build_once(folder / f"{path.stem}-{key}.safetensors", build)
