"""Random weights for a config without a checkpoint: benchmarks and tests of everything else."""

from collections.abc import Iterable, Sequence

import torch
import xxhash

from tandem_engine.models.parameters import Parameter
from tandem_engine.weights.source import TensorSource

_SPREAD = 0.02


class RandomSource(TensorSource):
    """Normal weights of spread 0.02 and norms of 1, the same on every worker for one seed."""

    norms_are_final = True

    def __init__(self, parameters: Sequence[Parameter], seed: int = 0) -> None:
        self._seed = seed
        self._shapes = {
            part: shape
            for parameter in parameters
            for part, shape in zip(parameter.parts, parameter.part_shapes, strict=True)
        }

    def names(self) -> Iterable[str]:
        return self._shapes

    def load(self, name: str) -> torch.Tensor:
        shape = self._shapes[name]
        if name.endswith("norm.weight") or "layernorm" in name:
            return torch.ones(shape)
        generator = torch.Generator().manual_seed(
            xxhash.xxh3_64_intdigest(name.encode(), seed=self._seed) >> 1
        )
        return torch.randn(shape, generator=generator) * _SPREAD
