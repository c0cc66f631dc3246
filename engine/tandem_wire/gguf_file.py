"""Reading GGUF files: metadata and where each tensor lies, without loading any tensor.

The layout is ggml's `docs/gguf.md`, versions 2 and 3, little-endian. A vocabulary of 262,144 tokens
takes a fraction of a second here, which is why this isn't left to the `gguf` package's reader
(which takes ten seconds for the same file); dequantisation is that package's.
"""

import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_MAGIC: Final = b"GGUF"
_DEFAULT_ALIGNMENT: Final = 32
_SCALARS: Final = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING: Final = 8
_ARRAY: Final = 9
_MAX_DIMENSIONS: Final = 8
_SPLIT: Final = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")

Scalar = int | float | bool | str
MetadataValue = Scalar | list[Scalar]


class GgufError(ValueError):
    """The file is not a GGUF file that can be read; the message says where it breaks."""


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor's place in the file.

    `shape` is in row-major order (outermost first; GGUF itself stores the reverse), `ggml_type` the
    number of its quantisation type, `offset` its first byte from the start of the file at `path`.
    """

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    offset: int
    path: Path


@dataclass(frozen=True, slots=True)
class GgufFile:
    """Metadata by key, and tensors in file order.

    A model may be split into several files: then `path` and the metadata are those of the first,
    and the tensors those of all.
    """

    path: Path
    metadata: dict[str, MetadataValue]
    tensors: tuple[GgufTensor, ...]

    def text(self, key: str, default: str = "") -> str:
        """A string of the metadata."""
        value = self.metadata.get(key, default)
        if not isinstance(value, str):
            raise GgufError(f"{self.path}: metadata {key!r} should be text, not {value!r}")
        return value

    def integer(self, key: str) -> int | None:
        """An integer of the metadata, or None when absent."""
        value = self.metadata.get(key)
        if value is None or (isinstance(value, int) and not isinstance(value, bool)):
            return value
        raise GgufError(f"{self.path}: metadata {key!r} should be an integer, not {value!r}")

    def number(self, key: str) -> float | None:
        """A number of the metadata, or None when absent."""
        value = self.metadata.get(key)
        if value is None or isinstance(value, (int, float)):
            return value
        raise GgufError(f"{self.path}: metadata {key!r} should be a number, not {value!r}")

    def array(self, key: str) -> list[Scalar]:
        """An array of the metadata, empty when absent."""
        value = self.metadata.get(key, [])
        if not isinstance(value, list):
            raise GgufError(f"{self.path}: metadata {key!r} should be an array, not {value!r}")
        return value


class _Cursor:
    """A position in the mapped file."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def take(self, form: str) -> tuple[int | float, ...]:
        values = struct.unpack_from("<" + form, self.data, self.at)
        self.at += struct.calcsize("<" + form)
        return values

    def count(self) -> int:
        value = int(self.take("Q")[0])
        if value > len(self.data):
            raise GgufError(f"a count of {value} at byte {self.at - 8} is larger than the file")
        return value

    def string(self) -> str:
        size = self.count()
        start = self.at
        self.at += size
        if self.at > len(self.data):
            raise GgufError(f"a text of {size} bytes at byte {start} runs past the end")
        # Byte-level vocabularies hold pieces that are not valid UTF-8 by themselves.
        return self.data[start : self.at].decode("utf-8", "surrogateescape")

    def value(self, kind: int) -> MetadataValue:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            item = int(self.take("I")[0])
            size = self.count()
            if item == _STRING:
                return [self.string() for _ in range(size)]
            return list(self.take(f"{size}{self.scalar(item)}"))
        return self.take(self.scalar(kind))[0]

    def scalar(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise GgufError(f"unknown value type {kind} at byte {self.at}")
        return _SCALARS[kind]


def split_files(path: Path) -> list[Path]:
    """All files of a model that is split like NAME-00001-of-00003.gguf, or the one file."""
    match = _SPLIT.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    return [
        path.with_name(f"{match['stem']}-{number:05}-of-{count:05}.gguf")
        for number in range(1, count + 1)
    ]


def file_identity(path: Path) -> str:
    """A text that changes when a GGUF file, or one of several that are a model, is another."""
    found = []
    for file in split_files(path):
        status = file.stat()
        found.append(f"{file.resolve()}:{status.st_size}:{status.st_mtime_ns}")
    return " ".join(found)


def read_gguf(path: Path) -> GgufFile:
    """Read the header of a GGUF file, or the headers of all files of a split one.

    Raises:
        GgufError: not a GGUF file, cut short, of another version, or one of several is missing.
        OSError: the file can't be opened.
    """
    files = split_files(path)
    if len(files) == 1:
        return _read_file(path)
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise GgufError(f"{path} is one of {len(files)} files: {', '.join(missing)} is missing")
    read = [_read_file(file) for file in files]
    tensors = tuple(tensor for file in read for tensor in file.tensors)
    promised = read[0].integer("split.tensors.count")
    if promised is not None and promised != len(tensors):
        raise GgufError(f"{files[0]} promises {promised} tensors, but {len(tensors)} were found")
    return GgufFile(files[0], read[0].metadata, tensors)


def _read_file(path: Path) -> GgufFile:
    with path.open("rb") as file:
        if file.read(4) != _MAGIC:
            raise GgufError(f"{path} doesn't start with GGUF's magic bytes")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _read_header(path, _Cursor(data))
            except struct.error as error:
                raise GgufError(f"{path} is cut short: {error}") from error
            except GgufError as error:
                raise GgufError(f"{path}: {error}") from error


def _read_header(path: Path, cursor: _Cursor) -> GgufFile:
    cursor.at = len(_MAGIC)
    version = int(cursor.take("I")[0])
    if version not in (2, 3):
        raise GgufError(f"version {version} is not 2 or 3 (or the file is big-endian)")
    num_tensors, num_values = cursor.count(), cursor.count()
    metadata: dict[str, MetadataValue] = {}
    for _ in range(num_values):
        key = cursor.string()
        metadata[key] = cursor.value(int(cursor.take("I")[0]))
    found: list[tuple[str, tuple[int, ...], int, int]] = []
    for _ in range(num_tensors):
        name = cursor.string()
        num_dimensions = int(cursor.take("I")[0])
        if num_dimensions > _MAX_DIMENSIONS:
            raise GgufError(f"tensor {name!r} has {num_dimensions} dimensions")
        shape = tuple(int(size) for size in reversed(cursor.take(f"{num_dimensions}Q")))
        kind, offset = (int(value) for value in cursor.take("IQ"))
        found.append((name, shape, kind, offset))
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0:
        raise GgufError(f"general.alignment {alignment!r} is not a positive integer")
    base = -(-cursor.at // alignment) * alignment
    tensors = tuple(
        GgufTensor(name, shape, kind, base + at, path) for name, shape, kind, at in found
    )
    return GgufFile(path, metadata, tensors)
