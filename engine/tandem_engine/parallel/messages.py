"""Frames between the first rank and each of the others (MessagePack over socket pairs).

Each rank has three connections: one for steps, which it runs in order, one for pages to export and
one for pages to import, which it serves at the same time.
"""

from collections.abc import Sequence

import msgspec

from tandem_engine.config import WorkerConfig
from tandem_engine.step import ScoredRows


class RankStart(msgspec.Struct, frozen=True, tag="start"):
    """What a rank is started with: the first frame to its process.

    `store` is the file by which ranks find each other; empty for the only rank of a worker.
    """

    config: WorkerConfig
    rank: int
    store: str


class RankReady(msgspec.Struct, frozen=True, tag="ready"):
    """The rank's answer to its start, once everything is loaded."""

    num_blocks: int


class RankItem(msgspec.Struct, frozen=True, array_like=True):
    """A `BatchItem` without what only sampling needs.

    Its block table is the first `known` entries of its table in the step before, then `blocks`.
    """

    rid: str
    tokens: Sequence[int]
    start: int
    known: int
    blocks: Sequence[int]
    sample: bool
    previous: int


class RankStep(msgspec.Struct, frozen=True, tag="step"):
    """A `Batch` to launch."""

    items: list[RankItem]
    copies: list[tuple[int, int]]
    scored: list[ScoredRows] = []


class RankStop(msgspec.Struct, frozen=True, tag="stop"):
    """The last frame: free everything and end."""


class PageRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Write pages to the shared file, or read them from it, at bytes [at, at + num_bytes).

    The rank waits until `step` has run (steps count from 1).
    """

    step: int
    blocks: Sequence[int]
    first_layer: int
    num_layers: int
    at: int
    num_bytes: int


class PageReply(msgspec.Struct, frozen=True):
    """The answer to a `PageRequest`; `error` is empty if it is done."""

    error: str = ""


ToRank = RankStep | RankStop
