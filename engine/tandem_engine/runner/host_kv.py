"""The KV cache of one worker on the host: one tensor, which may be a file that peers write to."""

import fcntl
import mmap
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch

from tandem_engine.errors import ConfigError
from tandem_engine.step import KVStore
from tandem_wire.disk_cache import file_lock
from tandem_wire.handoff import KVLayout

_PREFIX: Final = "tandem-kv-"


class HostKVStore(KVStore):
    """KV as [layer, K/V, block, head, token, dim] in host memory.

    The memory is zero at first, so that padding never holds NaN. With a `shared_dir` it is a file
    there, which this process keeps locked as long as it lives; files of dead processes are removed.
    The scheduler's thread writes through `cache`, the hand-off's through `import_blocks`, each to
    blocks of its own, so neither needs a lock.

    Raises:
        ConfigError: the shared directory is too small.
    """

    def __init__(
        self, layout: KVLayout, num_blocks: int, dtype: torch.dtype, shared_dir: str = ""
    ) -> None:
        self.layout = layout
        self._size = num_blocks * layout.block_bytes
        self._path: Path | None = None
        descriptor = -1
        if shared_dir:
            self._path = Path(shared_dir) / f"{_PREFIX}{secrets.token_hex(8)}"
            descriptor = _make_file(self._path, self._size)
        self._descriptor = descriptor
        self._memory = mmap.mmap(descriptor, self._size)
        shape = (layout.num_layers, layout.num_planes, num_blocks)
        self._pages = np.frombuffer(self._memory, np.uint8).reshape(*shape, layout.page_bytes)
        self.cache = torch.frombuffer(self._memory, dtype=dtype).view(
            *shape, layout.num_kv_heads, layout.page_size, layout.head_dim
        )
        """[layers, planes, N, K, P, D]."""

    def export_blocks(self, blocks: Sequence[int], layers: range) -> memoryview:
        chosen = self._pages[layers.start : layers.stop]
        return chosen.take(np.asarray(blocks, np.int64), axis=2).data.cast("B")

    def import_blocks(self, blocks: Sequence[int], layers: range, data: memoryview) -> None:
        chosen = self._pages[layers.start : layers.stop]
        expected = len(layers) * len(blocks) * self.layout.layer_bytes
        if data.nbytes != expected:
            raise ValueError(f"got {data.nbytes} bytes for pages of {expected} bytes")
        packed = np.frombuffer(data, np.uint8)
        chosen[:, :, np.asarray(blocks, np.int64)] = packed.reshape(
            len(layers), self.layout.num_planes, len(blocks), self.layout.page_bytes
        )

    def copy_block(self, source: int, destination: int) -> None:
        """Copy all layers of one block."""
        self._pages[:, :, destination] = self._pages[:, :, source]

    def shared_file(self) -> tuple[str, int] | None:
        return None if self._path is None else (str(self._path), self._size)

    def close(self) -> None:
        """Remove the shared file; the memory itself lives as long as a tensor views it."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._path = None


def _make_file(path: Path, size: int) -> int:
    """A file of zeros, locked; its open descriptor."""
    directory = path.parent
    directory.mkdir(parents=True, exist_ok=True)
    with file_lock(directory / f".{_PREFIX}lock"):
        _remove_leftovers(directory)
        return _make_locked(path, size)


def _make_locked(path: Path, size: int) -> int:
    directory = path.parent
    space = os.statvfs(directory)
    free = space.f_bavail * space.f_frsize
    if free < size:
        raise ConfigError(
            f"the KV cache needs {size} bytes, but {directory} (TANDEM_SHM_DIR) has {free} free; "
            "lower --kv-memory, or give the pods a larger shared memory directory"
        )
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o660)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    os.ftruncate(descriptor, size)
    return descriptor


def _remove_leftovers(directory: Path) -> None:
    """Delete KV files whose owners are dead. A lock ends with its process."""
    for path in directory.glob(f"{_PREFIX}*"):
        try:
            descriptor = os.open(path, os.O_RDWR)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
        except BlockingIOError:
            pass  # alive
        finally:
            os.close(descriptor)
