"""Parameters from safetensors files straight into a device's memory.

Several threads each read pieces of the files into pinned buffers and start the copies to the GPU on
a stream of their own, so that one piece is read while the one before is copied. No second copy of
the model exists anywhere; conversions happen on the device.
"""

import os
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from tandem_engine.models.parameters import Parameter
from tandem_engine.models.shard import WHOLE, Shard, sharded_shape
from tandem_engine.weights.safetensors_header import TensorPlace
from tandem_engine.weights.source import Progress, check_names
from tandem_engine.weights.transfer_plan import Piece, plan_pieces
from tandem_wire.model_error import BadModelFileError

_REPORT_SECONDS: Final = 0.2


@dataclass(frozen=True, slots=True)
class Staging:
    """Host memory on the way: each thread has two buffers of `buffer_bytes`."""

    num_threads: int = 8
    buffer_bytes: int = 16 << 20


def stream_parameters(
    parameters: Sequence[Parameter],
    places: Mapping[str, TensorPlace],
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None = None,
    shard: Shard = WHOLE,
    staging: Staging = Staging(),
) -> dict[str, torch.Tensor]:
    """A rank's slice of every parameter on `device`, in its dtype, by our names.

    Raises:
        BadModelFileError: tensors are missing, unknown, of another shape, or can't be read.
        ConfigError: the model can't be divided among this many ranks.
    """
    check_names(parameters, places)
    tensors = {
        parameter.name: torch.empty(
            sharded_shape(parameter, shard), dtype=parameter.dtype_in(dtype), device=device
        )
        for parameter in parameters
    }
    pieces = plan_pieces(parameters, places, tensors, shard, staging.buffer_bytes)
    buffer_bytes = max((piece.num_bytes for piece in pieces), default=0)
    total = max(sum(piece.num_bytes for piece in pieces), 1)
    queue = deque(pieces)
    if device.type == "cuda":
        # Work queued before the tensors were made may still use their memory.
        torch.cuda.current_stream(device).synchronize()
    with ExitStack() as stack:
        files = {path: _OpenFile(path, stack) for path in sorted({piece.path for piece in pieces})}
        pool = stack.enter_context(ThreadPoolExecutor(staging.num_threads, "weights"))
        stack.callback(queue.clear)  # so that the readers end, whatever goes wrong here
        readers = [_Reader(device, buffer_bytes, files) for _ in range(staging.num_threads)]
        running = {pool.submit(reader.run, queue) for reader in readers}
        while running:
            done, running = wait(running, _REPORT_SECONDS, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            if progress is not None and running:
                progress(min(sum(reader.num_bytes for reader in readers) / total, 1.0))
    del readers
    if device.type == "cuda":
        # Free the pinned buffers and the conversions' scratch: the KV cache wants that memory.
        torch._C._host_emptyCache()
        torch.cuda.empty_cache()
    if progress is not None:
        progress(1.0)
    return tensors


class _OpenFile:
    """A file that all readers share. `stack` closes it."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self._path = path
        try:
            self._file = os.open(path, os.O_RDONLY)
            stack.callback(os.close, self._file)
            self._mapped = np.memmap(path, np.uint8, "r")
        except OSError as error:
            raise BadModelFileError(f"{path}: {error}", "download the model again") from error

    def read(self, piece: Piece, buffer: npt.NDArray[np.uint8]) -> None:
        """Fill `buffer` [num_bytes] with a piece's bytes. Raises BadModelFileError."""
        if piece.num_rows > 1:
            # Runs too short for a system call each are copied from the mapped file.
            runs: npt.NDArray[np.uint8] = np.ndarray(
                (piece.num_rows, piece.row_bytes),
                np.uint8,
                self._mapped,
                piece.offset,
                (piece.stride, 1),
            )
            np.copyto(buffer.reshape(runs.shape), runs)
            return
        view, done = buffer.data, 0
        while done < len(view):
            try:
                count = os.preadv(self._file, [view[done:]], piece.offset + done)
            except OSError as error:
                raise BadModelFileError(
                    f"{self._path}: {error}", "check the disk, or download the model again"
                ) from error
            if count == 0:
                raise BadModelFileError(
                    f"{self._path} was cut short while being read", "download the model again"
                )
            done += count


class _Reader:
    """One thread's work. `num_bytes` counts the bytes that it has read so far.

    The thread makes its own buffers, since pinning them takes as long as filling them.
    """

    def __init__(
        self, device: torch.device, buffer_bytes: int, files: Mapping[Path, _OpenFile]
    ) -> None:
        self._device = device
        self._buffer_bytes = buffer_bytes
        self._files = files
        self.num_bytes = 0

    def run(self, queue: deque[Piece]) -> None:
        """Take pieces until none are left. Returns when the last one has arrived."""
        if self._device.type == "cuda":
            self._run_on_gpu(queue)
            return
        buffer = torch.empty(self._buffer_bytes, dtype=torch.uint8)
        while (piece := _next(queue)) is not None:
            self._read(piece, buffer)
            _place(piece, buffer)

    def _run_on_gpu(self, queue: deque[Piece]) -> None:
        stream = torch.cuda.Stream(self._device)
        with torch.cuda.stream(stream):
            slots = [
                (
                    torch.empty(self._buffer_bytes, dtype=torch.uint8, pin_memory=True),
                    torch.cuda.Event(),
                )
                for _ in range(2)
            ]
            number = 0
            while (piece := _next(queue)) is not None:
                buffer, copied = slots[number % len(slots)]
                number += 1
                copied.synchronize()
                self._read(piece, buffer)
                _place(piece, buffer)
                copied.record(stream)
        stream.synchronize()

    def _read(self, piece: Piece, buffer: torch.Tensor) -> None:
        self._files[piece.path].read(piece, buffer[: piece.num_bytes].numpy())
        self.num_bytes += piece.num_bytes


def _next(queue: deque[Piece]) -> Piece | None:
    try:
        return queue.popleft()
    except IndexError:
        return None


def _place(piece: Piece, buffer: torch.Tensor) -> None:
    """Start the copy of a piece from `buffer` to its target, on the current stream of a GPU."""
    found = buffer[: piece.num_bytes].view(piece.dtype)
    if found.dtype != piece.target.dtype or piece.addend:
        found = found.to(piece.target.device, non_blocking=True)
    if piece.addend:
        found = found.float() + piece.addend
    piece.target.copy_(found, non_blocking=True)
