"""A model's parameters from its files, in the cheapest way there is."""

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
from tandem_wire.gguf_file import file_identity, read_gguf

ROPE_FACTORS = "rope_factors"
"""An extra parameter, only of GGUF files: divisors of the rope's frequencies."""

CPU: Final = torch.device("cpu")
_CACHE_VERSION: Final = 2


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """Where the weights are: in a directory, in a GGUF file, or nowhere (random ones)."""

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

    On the CPU they are views of the mapped files where possible; to a GPU they are streamed
    (`streaming.py`). A GGUF file is dequantised once per machine and dtype, into `cache_dir`, and
    loaded from there.

    Raises:
        ModelSourceError: damaged, incomplete or unsupported files.
        ConfigError: the model can't be divided among this many ranks.
    """
    parameters = build_parameters(spec)
    on_cpu = device.type == "cpu"
    if files.format == "Gguf":
        if on_cpu and shard == WHOLE:
            return map_parameters(_dequantise(spec, files.path, dtype, cache_dir, progress))
        advance = None if progress is None else _forwards(progress)
        cached = _dequantise(spec, files.path, dtype, cache_dir, advance)
        return _stream_cached(parameters, cached, dtype, device, advance, shard)
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


def _stream_cached(
    parameters: list[Parameter],
    cached: Path,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None,
    shard: Shard,
) -> dict[str, torch.Tensor]:
    """A rank's slices of the parameters in a file of our own, which holds them whole."""
    places = read_header(cached)
    parts = {
        part: place
        for parameter in parameters
        for part, place in split_fused(parameter, places[parameter.name])
    }
    # The offsets were added when the file was written.
    final = [replace(parameter, offset=0.0) for parameter in parameters]
    tensors = stream_parameters(final, parts, dtype, device, progress, shard)
    if ROPE_FACTORS in places:
        tensors[ROPE_FACTORS] = map_parameters(cached)[ROPE_FACTORS].to(device)
    return tensors


def _forwards(progress: Progress) -> Progress:
    """`progress` for two passes over the same bytes, of which the second starts at the beginning.

    What it reports never goes back.
    """
    furthest = 0.0

    def advance(fraction: float) -> None:
        nonlocal furthest
        furthest = max(furthest, fraction)
        progress(furthest)

    return advance


def _dequantise(
    spec: ModelSpec, path: Path, dtype: torch.dtype, cache_dir: Path, progress: Progress | None
) -> Path:
    """The cached file with the parameters of a GGUF file, which is made now if it is missing."""

    def build(target: Path) -> None:
        # Imported here, since a warm start dequantises nothing.
        from tandem_engine.weights.gguf_source import GgufSource

        source = GgufSource(read_gguf(path), spec)
        parameters = build_parameters(spec)
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

    identity = (file_identity(path), str(dtype), _CACHE_VERSION)
    key = xxhash.xxh3_64_hexdigest(repr(identity).encode())
    folder = cache_dir / "weights"
    return build_once(folder / f"{path.stem}-{key}.safetensors", build)
