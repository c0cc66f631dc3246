"""A model's parameters from its files, by the cheapest way there is."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

import torch
import xxhash

from tandem_engine.models.parameters import Parameter, build_parameters
from tandem_engine.models.spec import ModelSpec
from tandem_engine.weights.parameter_file import map_parameters, write_parameters
from tandem_engine.weights.random_source import RandomSource
from tandem_engine.weights.source import Progress, TensorSource, iterate_parameters
from tandem_wire.disk_cache import build_once
from tandem_wire.gguf_file import read_gguf

ROPE_FACTORS = "rope_factors"
"""Extra entry of the parameters: divisors of the rope's frequencies, from GGUF files only."""

_CACHE_VERSION = 1
CPU = torch.device("cpu")


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
) -> dict[str, torch.Tensor]:
    """All parameters of the model on `device`, by our names.

    GGUF files are dequantised once per machine and dtype, into `cache_dir`, and mapped from there.

    Raises:
        ModelSourceError: damaged, incomplete or unsupported files.
    """
    parameters = build_parameters(spec)
    if files.format == "Gguf":
        path = _dequantised(spec, files.path, parameters, dtype, cache_dir, progress)
        return {name: tensor.to(device) for name, tensor in map_parameters(path).items()}
    if files.format == "Dummy":
        source: TensorSource = RandomSource(parameters)
    else:
        from tandem_engine.weights.safetensors_dir import SafetensorsDirectory

        source = SafetensorsDirectory(files.path)
    found = iterate_parameters(parameters, source, dtype, progress)
    return {name: tensor.to(device) for name, tensor in found}


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
        layout = {parameter.name: (parameter.shape, dtype) for parameter in parameters}
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
