"""Messages between a decode worker and a prefill worker, at the prefill worker's bootstrap port.

The decode worker (D) opens one control connection per prefill worker (P), kept for as long as both
live. `Handshake` is answered by `HandshakeReply`; an unknown pairing is refused there. D tries the
chosen transport out by a `Probe`; if that fails, it opens another connection and offers the rest.
Then, per request: D sends `Prefill`; P pushes pages through the transport, reports them by
`ChunkPushed`, and ends with `Commit` or `PrefillFailed`. D may send `Fence` at any time; P answers
`Fenced` once no write of that epoch can land any more. Both sides send `Beat` at an interval;
silence for three intervals means that the peer is gone, which frees every lease of that connection.

A transport may have messages of its own on the control connection (`PagesWritten`, `SlotFreed`,
`PagesReady`) and data connections to the same port, whose first frame is `DataHello`.
"""

from typing import Final, Literal

import msgspec

from tandem_wire.messages import PROTOCOL, SamplingParams, TokenLogprobs

TransportName = Literal["shm", "tcp", "cudaIpc", "cudaIpcRing", "nixl", "mooncake"]
"""A transport as messages, metrics and status write it. `cudaIpcRing` is never chosen by name: it
stands in for `cudaIpc` where P can't write D's cache itself."""

TransportChoice = Literal["Auto", "Shm", "Tcp", "CudaIpc", "Nixl", "Mooncake"]
"""A transport as `--transfer` and the API write it; `Auto`: the best that both sides can do."""

TRANSPORT_CHOICES: Final[dict[TransportName | Literal["auto"], TransportChoice]] = {
    "auto": "Auto",
    "shm": "Shm",
    "tcp": "Tcp",
    "cudaIpc": "CudaIpc",
    "cudaIpcRing": "CudaIpc",
    "nixl": "Nixl",
    "mooncake": "Mooncake",
}
"""Both spellings of every transport (cudaIpcRing is a part of CudaIpc). Which of them are built,
the hand-off's registry says."""


def transport_name(choice: TransportChoice) -> TransportName | Literal["auto"]:
    """Give the wire's spelling of a choice."""
    return next(name for name, known in TRANSPORT_CHOICES.items() if known == choice)


class KVLayout(msgspec.Struct, frozen=True, kw_only=True):
    """How one worker keeps KV; both sides of a hand-off must agree on all of it.

    A page holds `page_size` tokens of one layer's K or V, as [num_kv_heads, page_size, head_dim].
    On the wire the pages of a layer group are packed [layer, K/V, page, head, token, dim]. Latent
    attention keeps one plane instead of K and V: one head whose dimensions are those of the latent
    and of the rotated key.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    dtype: str  # "float32" | "bfloat16" | "float16" | "float8_e4m3fn" | "uint8" (mock)
    itemsize: int
    tensor_parallel: int = 1
    num_planes: int = 2  # K and V, or 1: latents
    windows: tuple[int, ...] = ()
    """By layer: the tokens that a query sees, itself included; 0: all. Empty: every layer sees all.

    Of a prompt's first blocks, the layers with a window don't travel.
    """

    @property
    def window(self) -> int:
        """The largest window, by which all layers that have one go; 0: none has."""
        return max(self.windows, default=0)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page of one layer and plane."""
        return self.num_kv_heads * self.page_size * self.head_dim * self.itemsize

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer of one block: the page of every plane."""
        return self.num_planes * self.page_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of one block: all layers."""
        return self.num_layers * self.layer_bytes


class TransportOffer(msgspec.Struct, frozen=True):
    """A transport that one side can do, with what the other side's end of it needs."""

    name: TransportName
    details: dict[str, str | int] = {}


class Handshake(msgspec.Struct, frozen=True, kw_only=True, tag="handshake"):
    """The first frame of a control connection, D to P. `offers` come best first."""

    worker_id: str
    boot_id: str
    session: str
    compatibility_hash: str
    layout: KVLayout
    offers: list[TransportOffer]
    heartbeat_seconds: float
    protocol: int = PROTOCOL


class HandshakeReply(msgspec.Struct, frozen=True, kw_only=True, tag="handshake_reply"):
    """P's answer. With `error` set the pairing is refused and the connection closes.

    `passed_over` says why P took none of the offers before the one that it chose.
    """

    worker_id: str
    boot_id: str
    transport: TransportOffer | None = None
    passed_over: dict[TransportName, str] = {}
    error: str = ""
    remedy: str = ""


class DataHello(msgspec.Struct, frozen=True, tag="data_hello"):
    """The first frame of a transport's data connection: which session it belongs to."""

    session: str
    stream: int


class Prefill(msgspec.Struct, frozen=True, kw_only=True, tag="prefill"):
    """D asks P for the KV of `tokens[num_skip_tokens:]`.

    `blocks[i]` is D's block for tokens from num_skip_tokens + i * page_size on; `num_skip_tokens`
    is a multiple of the page size. Layers with a window travel only of the last blocks. `epoch`
    grows with every attempt of a rid. P keeps its pages for D no longer than `lease_seconds` after
    the last heartbeat.
    """

    rid: str
    epoch: int
    tokens: list[int]
    num_prompt_tokens: int
    num_skip_tokens: int
    blocks: list[int]
    params: SamplingParams
    priority: int = 0
    cache_salt: str = ""
    lease_seconds: float = 10.0


class ChunkPushed(msgspec.Struct, frozen=True, tag="chunk"):
    """Pages up to (not including) token `num_tokens` have been handed to the transport."""

    rid: str
    epoch: int
    num_tokens: int


class Commit(msgspec.Struct, frozen=True, kw_only=True, tag="commit"):
    """All pages have landed. D checks the counts and the checksum before it decodes.

    `checksum` is the sum modulo 2**64 of the checksums of the attempt's writes, so it doesn't
    depend on the order in which they arrive; 0 when checksums are off. That of a write is
    xxh3_64(payload, seed=xxh3_64(place)), where place is the first layer and D's block numbers as
    little-endian uint32; cudaIpc, cudaIpcRing, and nixl with rings on GPUs, have a checksum that a
    GPU computes, with the same seed.
    """

    rid: str
    epoch: int
    num_tokens: int
    num_bytes: int
    checksum: int
    first_token: int
    first_logprobs: TokenLogprobs | None = None
    num_cached_tokens: int = 0
    prefill_seconds: float = 0.0
    transfer_seconds: float = 0.0


FailureCode = Literal[
    "no_room", "too_long", "draining", "invalid", "transport", "expired", "internal"
]
"""Why P will not deliver. `transport`: its writes failed; `expired`: D was silent for too long."""


class PrefillFailed(msgspec.Struct, frozen=True, kw_only=True, tag="prefill_failed"):
    """P will not deliver; nothing of this epoch will be written after this frame."""

    rid: str
    epoch: int
    code: FailureCode
    message: str


class Fence(msgspec.Struct, frozen=True, tag="fence"):
    """D gives up on (rid, epoch): P stops its work and answers when no write can land any more."""

    rid: str
    epoch: int


class Fenced(msgspec.Struct, frozen=True, tag="fenced"):
    """P's acknowledgement of a `Fence`; only now may D reuse the pages."""

    rid: str
    epoch: int


class PagesWritten(msgspec.Struct, frozen=True, tag="pages"):
    """P to D: some layers of D's `blocks` have been written, to `slot` where a ring has slots."""

    epoch: int
    slot: int
    blocks: list[int]
    num_bytes: int
    first_layer: int
    num_layers: int


class PagesReady(msgspec.Struct, frozen=True, tag="ready"):
    """D to P, one-sided: no step of D's can still write to the epoch's blocks, so P may."""

    epoch: int


class SlotFreed(msgspec.Struct, frozen=True, tag="slot"):
    """D to P: a slot's bytes were taken or dropped as stale; P may fill it again."""

    slot: int


TRY_OUT_EPOCH: Final = 0
"""The epoch of the probe that D sends over every new session before it uses it."""


class Probe(msgspec.Struct, frozen=True, tag="probe"):
    """D asks for `num_blocks` blocks of a known pattern, sent as KV is; answered by `Commit`.

    No block of either side is read or written: the pattern is made on P and checked on D.
    `epoch` is `TRY_OUT_EPOCH`, or one of the numbers that D's `Prefill` messages use; `Fence` works
    as for those.
    """

    epoch: int
    num_blocks: int

    @property
    def rid(self) -> str:
        """What stands for a request's id in the answers."""
        return ""


class Beat(msgspec.Struct, frozen=True, tag="beat"):
    """Heartbeat, both ways; D's beat renews the leases that P holds for it.

    `num_chunks` counts the chunks that P has computed since its start, for any D. While it grows, a
    prompt that waits for its turn at P is not stalled.
    """

    draining: bool = False
    num_chunks: int = 0


HandoffMessage = (
    Handshake
    | HandshakeReply
    | DataHello
    | Prefill
    | ChunkPushed
    | Commit
    | PrefillFailed
    | Fence
    | Fenced
    | PagesWritten
    | SlotFreed
    | PagesReady
    | Probe
    | Beat
)
