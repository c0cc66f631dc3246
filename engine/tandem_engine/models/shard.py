"""Which slice of each parameter one rank of a tensor-parallel group holds.

The scheme is Megatron-LM's (arXiv 1909.08053, section 3): a projection from the hidden size is cut
along its rows, one back to the hidden size along its columns, the embedding along the vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Final

import torch

from tandem_engine.errors import ConfigError
from tandem_engine.models.parameters import Parameter
from tandem_engine.spec.model import ModelSpec


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank of a group; `WHOLE` is the only rank of a group of one."""

    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.world_size

    def kv_heads(self, count: int) -> range:
        """This rank's part of a model's KV heads; with more ranks than heads, several share one."""
        if count >= self.world_size:
            size = count // self.world_size
            return range(self.rank * size, (self.rank + 1) * size)
        head = self.rank * count // self.world_size
        return range(head, head + 1)


WHOLE: Final = Shard()


@dataclass(frozen=True, slots=True)
class Cut:
    """A rank's slice [start, stop) of a part, along `dimension` of it.

    `size` is its room in the rank's parameter. That is more than the slice where the vocabulary
    doesn't divide evenly, and zeros fill the rest.
    """

    dimension: int
    start: int
    stop: int
    size: int


def cut_part(parameter: Parameter, index: int, shard: Shard) -> Cut:
    """The slice of `parameter.parts[index]` that a rank holds.

    Raises:
        ConfigError: the part can't be divided among this many ranks.
    """
    shape = parameter.part_shapes[index]
    dimension = len(shape) - 1 if parameter.split == "columns" else 0
    length, ranks = shape[dimension], shard.world_size
    if parameter.split is None or shard == WHOLE:
        return Cut(dimension, 0, length, length)
    if parameter.split == "vocabulary":
        size = -(-length // ranks)
        start = min(shard.rank * size, length)
        return Cut(dimension, start, min(start + size, length), size)
    units = parameter.units[index] if parameter.units else length
    if units % ranks == 0:
        size = length // ranks
        return Cut(dimension, shard.rank * size, (shard.rank + 1) * size, size)
    if parameter.units and units < parameter.units[0] and ranks % units == 0:
        # Fewer KV heads than ranks: neighbours hold the same head, that of their query heads.
        size = length // units
        start = shard.rank * units // ranks * size
        return Cut(dimension, start, start + size, size)
    raise ConfigError(
        f"{parameter.parts[index]} of {units} units can't be divided among {ranks} ranks; "
        "use a --tensor-parallel that divides the model's heads and MLP"
    )


def part_room(
    parameter: Parameter, shard: Shard, tensor: torch.Tensor
) -> Iterator[tuple[Cut, torch.Tensor]]:
    """Each part's cut, and its room in a rank's `tensor` of the parameter, a contiguous view."""
    flat, at = tensor.view(-1), 0
    for index, shape in enumerate(parameter.part_shapes):
        cut = cut_part(parameter, index, shard)
        local = (*shape[: cut.dimension], cut.size, *shape[cut.dimension + 1 :])
        room = flat[at : at + prod(local)].view(local)
        at += room.numel()
        yield cut, room
    assert at == flat.numel()


def sharded_shape(parameter: Parameter, shard: Shard) -> tuple[int, ...]:
    """Shape of a rank's slice of a parameter, its parts joined."""
    if parameter.split is None or shard == WHOLE:
        return parameter.shape
    sizes = [cut_part(parameter, index, shard).size for index in range(len(parameter.parts))]
    if parameter.split == "columns":
        return (*parameter.shape[:-1], sizes[0])
    return (sum(sizes), *parameter.shape[1:])


def shard_spec(spec: ModelSpec, shard: Shard) -> ModelSpec:
    """The spec that one rank computes by: that of the model, but with the rank's own heads alone.

    Raises:
        ConfigError: the heads can't be divided among this many ranks.
    """
    heads, kv_heads, ranks = spec.num_heads, spec.num_kv_heads, shard.world_size
    if heads % ranks or (kv_heads % ranks and ranks % kv_heads):
        raise ConfigError(
            f"--tensor-parallel is {ranks}, but there are {heads} query and {kv_heads} KV heads; "
            "use a number that divides both, or one that divides the query heads and is a multiple "
            "of the KV heads"
        )
    own = len(shard.kv_heads(kv_heads))
    return replace(spec, num_heads=heads // ranks, num_kv_heads=own)
