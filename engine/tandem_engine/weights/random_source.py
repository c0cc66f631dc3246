"""Random weights for a config without a checkpoint, for benchmarks and tests."""

from collections.abc import Iterable, Sequence

import torch
import xxhash

from tandem_engine.models.parameters import Parameter
from tandem_engine.models.shard import WHOLE, Shard, part_room, sharded_shape
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
        if _is_norm(name):
            return torch.ones(shape)
        generator = torch.Generator().manual_seed(_seed_of(name, self._seed))
        return torch.randn(shape, generator=generator) * _SPREAD


def make_random_parameters(
    parameters: Sequence[Parameter],
    dtype: torch.dtype,
    device: torch.device,
    shard: Shard = WHOLE,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Normal weights of spread 0.02 and norms of 1, drawn on the device itself in `dtype`.

    With one seed, all workers on one kind of device draw the same weights, and the ranks of a group
    slices of them. They differ from those of `RandomSource`.
    """
    generator = torch.Generator(device)
    found: dict[str, torch.Tensor] = {}
    for parameter in parameters:
        shape = sharded_shape(parameter, shard)
        own = parameter.dtype_in(dtype)
        found[parameter.name] = whole = torch.empty(shape, dtype=own, device=device)
        rooms = part_room(parameter, shard, whole)
        for name, part_shape, (cut, room) in zip(
            parameter.parts, parameter.part_shapes, rooms, strict=True
        ):
            if _is_norm(name):
                room.fill_(1.0)
                continue
            generator.manual_seed(_seed_of(name, seed))
            if tuple(room.shape) == part_shape:
                room.normal_(0.0, _SPREAD, generator=generator)
                continue
            # A rank draws the whole part and keeps its slice, or slices would depend on `shard`.
            drawn = torch.empty(part_shape, dtype=dtype, device=device)
            drawn.normal_(0.0, _SPREAD, generator=generator)
            size = cut.stop - cut.start
            room.zero_()
            room.narrow(cut.dimension, 0, size).copy_(drawn.narrow(cut.dimension, cut.start, size))
    return found


def _is_norm(name: str) -> bool:
    return name.endswith("norm.weight") or "layernorm" in name


def _seed_of(name: str, seed: int) -> int:
    return int(xxhash.xxh3_64_intdigest(name.encode(), seed=seed)) >> 1
