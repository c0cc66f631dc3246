"""Our parameters in one safetensors file, which is written as a stream and read by mapping it."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

import torch
from safetensors import safe_open

from tandem_engine.models.parameters import Parameter
from tandem_engine.weights.safetensors_header import TensorPlace

_NAMES: Final = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_ALIGNMENT: Final = 4096


def write_parameters(
    path: Path,
    layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    tensors: Iterable[tuple[str, torch.Tensor]],
) -> None:
    """Write `tensors`, one at a time, in the order of `layout` (shape and dtype by name)."""
    header: dict[str, object] = {}
    end = 0
    for name, (shape, dtype) in layout.items():
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    written: list[str] = []
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors:
            assert (tuple(tensor.shape), tensor.dtype) == layout[name]
            file.write(tensor.contiguous().view(torch.uint8).numpy().data)
            written.append(name)
    assert written == list(layout)


def map_parameters(path: Path) -> dict[str, torch.Tensor]:
    """Views of the mapped file; processes on one machine share its pages. Never write to them."""
    with safe_open(str(path), framework="pt", device="cpu") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def split_fused(parameter: Parameter, place: TensorPlace) -> Iterator[tuple[str, TensorPlace]]:
    """The place of each part of a parameter, whose parts were written joined."""
    row = 0
    for part, shape in zip(parameter.parts, parameter.part_shapes, strict=True):
        yield part, place.rows(row, shape[0])
        row += shape[0]
