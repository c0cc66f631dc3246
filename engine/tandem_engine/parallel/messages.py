"""Frames between the first rank and each of the others (MessagePack over socket pairs).

Three connections each: steps, which the rank takes in order, and pages to export and to import,
which it serves beside them.
"""

from collections.abc import Sequence

import msgspec

from tandem_engine.config import WorkerConfig


class RankStart(msgspec.Struct, frozen=True, tag="start"):
    """What a rank is started with: the first frame to its process.

    `store` is the file by which ranks find each other; empty for the only rank of a worker.
    """

    config: WorkerConfig
    rank: int
    store: str


class RankReady(msgspec.Struct, frozen=True, tag="ready"):
    """The rank's answer once everything is loaded."""

    num_blocks: int


class RankItem(msgspec.Struct, frozen=True, array_like=True):
    """A `BatchItem`, without what only sampling needs.

    Its block table is the first `known` entries that it had in the step before, then `blocks`.
    """

    rid: str
    tokens: Sequence[int]
    start: int
    known: int
    blocks: Sequence[int]
    sample: bool
    previous: int


class RankStep(msgspec.Struct, frozen=True, tag="step"):
    """A `Batch`."""

    items: list[RankItem]
    copies: list[tuple[int, int]]


class RankStop(msgspec.Struct, frozen=True, tag="stop"):
    """The last frame: give everything back and end."""


class PageRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Write pages to the shared file, or take them from it: bytes [at, at + num_bytes).

    `step` must have run before (steps count from 1).
    """

    step: int
    blocks: Sequence[int]
    first_layer: int
    num_layers: int
    at: int
    num_bytes: int


class PageReply(msgspec.Struct, frozen=True):
    """Done, unless there was an error."""

    error: str = ""


ToRank = RankStep | RankStop
