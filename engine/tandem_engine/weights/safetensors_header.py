"""Where each tensor of a safetensors file lies, from its header alone.

The form (huggingface.co/docs/safetensors): eight bytes with the header's length, little-endian; the
header, a JSON object with dtype, shape and [begin, end) by name; the tensors, row-major.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from tandem_wire.model_error import BadModelFileError

_DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_MAX_HEADER_BYTES: Final = 100_000_000
_REMEDY: Final = "download the model again"


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """Where one tensor's bytes are; `offset` counts from the start of the file."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def rows(self, first: int, count: int) -> "TensorPlace":
        """The place of `count` rows of the tensor, from row `first`."""
        row_bytes = torch.Size(self.shape[1:]).numel() * self.dtype.itemsize
        shape = (count, *self.shape[1:])
        return TensorPlace(self.path, self.offset + first * row_bytes, shape, self.dtype)


def read_header(path: Path) -> dict[str, TensorPlace]:
    """Every tensor's place, checked against the size of the file.

    Raises:
        BadModelFileError: the file is missing, damaged, or has a tensor of an unknown dtype.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise BadModelFileError(f"{path} is cut short, or no safetensors file", _REMEDY)
            header = json.loads(file.read(length))
    except (OSError, ValueError) as error:
        if isinstance(error, BadModelFileError):
            raise
        raise BadModelFileError(f"{path}: {error}", _REMEDY) from error
    if not isinstance(header, dict):
        raise BadModelFileError(f"{path}: the header is not a JSON object", _REMEDY)
    start, places = 8 + length, {}
    for name, entry in header.items():
        if name != "__metadata__":
            places[name] = _read_place(path, name, entry, start, size)
    return places


def _read_place(path: Path, name: str, entry: Any, start: int, size: int) -> TensorPlace:
    try:
        kind, shape = entry["dtype"], tuple(int(length) for length in entry["shape"])
        begin, end = (int(offset) for offset in entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise BadModelFileError(
            f"{path}: the entry of tensor {name} is damaged: {error}", _REMEDY
        ) from error
    if kind not in _DTYPES:
        raise BadModelFileError(
            f"{path}: tensor {name} has the unsupported dtype {kind}",
            "use a checkpoint in BF16, F16 or F32",
        )
    if start + end > size:
        raise BadModelFileError(
            f"{path} is cut short: tensor {name} ends at byte {start + end} of {size}", _REMEDY
        )
    num_bytes = torch.Size(shape).numel() * _DTYPES[kind].itemsize
    if min(begin, *shape, 0) < 0 or end - begin != num_bytes:
        raise BadModelFileError(
            f"{path}: tensor {name} of shape {shape} can't be at [{begin}, {end})", _REMEDY
        )
    return TensorPlace(path, start + begin, shape, _DTYPES[kind])
