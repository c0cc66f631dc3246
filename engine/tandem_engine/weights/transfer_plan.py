"""A load as pieces of bounded size: which bytes of which file go where on the device."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from tandem_engine.models.parameters import Parameter
from tandem_engine.models.shard import Cut, Shard, part_room
from tandem_engine.weights.safetensors_header import TensorPlace
from tandem_engine.weights.source import check_shape


@dataclass(frozen=True, slots=True)
class Piece:
    """`num_rows` runs of `row_bytes` bytes, `stride` bytes apart, from `offset` in a file.

    They are elements of `dtype`, which go to `target` (flat, contiguous, of its own dtype) after
    `addend` is added. The piece doesn't own `target`.
    """

    path: Path
    offset: int
    num_rows: int
    row_bytes: int
    stride: int
    dtype: torch.dtype
    target: torch.Tensor
    addend: float

    @property
    def num_bytes(self) -> int:
        """Number of bytes to read."""
        return self.num_rows * self.row_bytes


def plan_pieces(
    parameters: Sequence[Parameter],
    places: Mapping[str, TensorPlace],
    tensors: Mapping[str, torch.Tensor],
    shard: Shard,
    max_bytes: int,
) -> list[Piece]:
    """Pieces of at most `max_bytes` (or one row of a slice) in the order of the files' bytes.

    Room in `tensors` that no file has bytes for (a padded vocabulary) is zeroed here.

    Raises:
        BadModelFileError: a tensor's shape is not what the config says.
        ConfigError: the model can't be divided among this many ranks.
    """
    pieces: list[Piece] = []
    for parameter in parameters:
        rooms = part_room(parameter, shard, tensors[parameter.name])
        for name, shape, (cut, room) in zip(
            parameter.parts, parameter.part_shapes, rooms, strict=True
        ):
            place = places[name]
            check_shape(name, place.shape, shape)
            pieces += _plan_part(place, cut, room, parameter.offset, max_bytes)
    pieces.sort(key=lambda piece: (piece.path, piece.offset))
    return pieces


def _plan_part(
    place: TensorPlace, cut: Cut, room: torch.Tensor, addend: float, max_bytes: int
) -> Iterator[Piece]:
    size, flat = place.dtype.itemsize, room.view(-1)
    length = place.shape[cut.dimension]
    inner = prod(place.shape[cut.dimension + 1 :]) * size  # bytes of one index along the cut
    outer = prod(place.shape[: cut.dimension])
    num_runs, stride = outer, length * inner
    run = (cut.stop - cut.start) * inner
    start = place.offset + cut.start * inner
    if cut.stop - cut.start < cut.size:
        flat[run // size * outer :].zero_()  # only the vocabulary has padding, which is one run
    if run == stride:
        num_runs, run = 1, outer * run
    if num_runs == 1:
        step = max(max_bytes // size, 1) * size
        for at in range(0, run, step):
            count = min(step, run - at)
            target = flat[at // size : (at + count) // size]
            yield Piece(place.path, start + at, 1, count, count, place.dtype, target, addend)
        return
    step = max(max_bytes // run, 1)
    for row in range(0, num_runs, step):
        count = min(step, num_runs - row)
        target = flat[row * run // size : (row + count) * run // size]
        offset = start + row * stride
        yield Piece(place.path, offset, count, run, stride, place.dtype, target, addend)
