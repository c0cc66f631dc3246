"""Whole pages, as the hand-off sees them, of a worker whose ranks have some heads each."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from socket import socket

import numpy as np
import numpy.typing as npt

from tandem_engine.parallel.group import RankGroup
from tandem_engine.parallel.messages import PageRequest
from tandem_engine.parallel.rank_process import RankProcess
from tandem_engine.parallel.shared_file import SharedFile
from tandem_engine.step import KVStore
from tandem_wire.handoff import KVLayout

_Bytes = npt.NDArray[np.uint8]


@dataclass(slots=True)
class StepCount:
    """Numbers of the last step launched and the last finished. Steps count from 1."""

    launched: int = 0
    finished: int = 0


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request to one rank to move its heads through its part of a shared file."""

    process: RankProcess
    connection: socket
    heads: range
    part: _Bytes  # [pages, heads, bytes]

    def request(self, blocks: Sequence[int], layers: range, step: int, at: int) -> None:
        self.process.ask(
            self.connection,
            PageRequest(
                step=step,
                blocks=blocks,
                first_layer=layers.start,
                num_layers=len(layers),
                at=at,
                num_bytes=self.part.nbytes,
            ),
        )


class ParallelKVStore(KVStore):
    """Gathers every rank's heads into pages, and scatters them.

    The layout is that of a worker of one rank, so that workers of any size can exchange pages.
    Ranks pack and unpack their own heads at the same time, through memory that they share and not
    through NCCL, which the steps use. One export and one import run at a time.

    Args:
        own: the first rank's pages.
        heads: of each rank; several ranks may have the same ones.
    """

    def __init__(
        self,
        own: KVStore,
        layout: KVLayout,
        heads: Sequence[range],
        group: RankGroup,
        steps: StepCount,
    ) -> None:
        self.layout = layout
        self.write_bytes = own.write_bytes
        self._own = own
        self._heads = heads
        self._group = group
        self._steps = steps
        self._reserved: dict[int, int] = {}
        """By block: the last step that may write to it for the sequence that had it before."""
        self._export_lock, self._import_lock = threading.Lock(), threading.Lock()
        self._head_bytes = layout.page_bytes // layout.num_kv_heads

    def reserve(self, blocks: Sequence[int]) -> None:
        self._own.reserve(blocks)
        self._reserved.update(dict.fromkeys(blocks, self._steps.launched))

    def export_blocks(self, blocks: Sequence[int], layers: range) -> memoryview:
        found = np.empty(prod(self._shape(blocks, layers)), np.uint8)
        self.export_into(blocks, layers, found.data)
        return found.data

    def export_into(self, blocks: Sequence[int], layers: range, out: memoryview) -> None:
        pages = np.frombuffer(out, np.uint8).reshape(self._shape(blocks, layers))
        with self._export_lock:
            asked = self._plan(self._group.exports, len(pages), exporting=True)
            # Pages that may be exported are those of steps whose results are known.
            step = self._steps.finished
            for number, rank in enumerate(asked):
                rank.request(blocks, layers, step, number * rank.part.nbytes)
            own = pages[:, self._heads[0].start : self._heads[0].stop]
            own[:] = np.frombuffer(self._own.export_blocks(blocks, layers), np.uint8).reshape(
                own.shape
            )
            for rank in asked:
                rank.process.answer(rank.connection)
                pages[:, rank.heads.start : rank.heads.stop] = rank.part

    def import_blocks(self, blocks: Sequence[int], layers: range, data: memoryview) -> None:
        shape = self._shape(blocks, layers)
        if data.nbytes != prod(shape):
            raise ValueError(f"got {data.nbytes} bytes for pages of {prod(shape)} bytes")
        pages = np.frombuffer(data, np.uint8).reshape(shape)
        with self._import_lock:
            asked = self._plan(self._group.imports, len(pages), exporting=False)
            latest = self._steps.launched
            step = max(self._reserved.get(block, latest) for block in blocks)
            for number, rank in enumerate(asked):
                rank.part[:] = pages[:, rank.heads.start : rank.heads.stop]
                rank.request(blocks, layers, step, number * rank.part.nbytes)
            own = np.ascontiguousarray(pages[:, self._heads[0].start : self._heads[0].stop])
            self._own.import_blocks(blocks, layers, own.reshape(-1).data)
            for rank in asked:
                rank.process.answer(rank.connection)

    def _shape(self, blocks: Sequence[int], layers: range) -> tuple[int, int, int]:
        """Number of pages, heads of a page, bytes of a head."""
        pages = len(layers) * self.layout.num_planes * len(blocks)
        return pages, self.layout.num_kv_heads, self._head_bytes

    def _plan(self, file: SharedFile, num_pages: int, *, exporting: bool) -> list[_Asked]:
        """The ranks to ask: all for an import, one per head that isn't our own for an export."""
        chosen = []
        covered = self._heads[0].stop
        for process in self._group.ranks:
            heads = self._heads[process.rank]
            if not exporting or heads.start >= covered:
                chosen.append((process, heads))
                covered = max(covered, heads.stop)
        shape = (num_pages, len(self._heads[0]), self._head_bytes)  # every rank has as many heads
        room = file.first(len(chosen) * prod(shape)).reshape(len(chosen), *shape)
        return [
            _Asked(process, process.exports if exporting else process.imports, heads, part)
            for (process, heads), part in zip(chosen, room, strict=True)
        ]
