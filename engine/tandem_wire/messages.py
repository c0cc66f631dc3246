"""Messages between a router and a worker, one framed TCP connection per pair (port 8101).

The order on a connection: the router sends `Hello`, the worker answers `Welcome` or `Refused` with
an empty `rid` and closes. From then on the router sends `Submit`, `Cancel` and `Ping`; the worker
sends one `Step` frame per engine step that holds the new tokens of every request of that router,
`Refused` for what it will not run, `WorkerState` at least once a second and on every change that
matters, `KvEvents`, and `Pong`.

All messages are msgspec structs, encoded as MessagePack and tagged by a short name. Fields are only
ever added, with defaults, so that two neighbouring releases understand each other; `PROTOCOL` is
raised when that can't be kept.
"""

from typing import Final, Literal

import msgspec

PROTOCOL: Final = 1

Role = Literal["prefill", "decode", "both"]
FinishReason = Literal["stop", "length", "cancelled", "moved", "error"]
"""`moved`: the worker gives the request up (drain, or no room is left for it); the router submits
it elsewhere with the tokens streamed so far. `stop`: an end-of-sequence or stop token id."""

RefusalCode = Literal[
    "too_long",  # prompt + max_tokens can never fit: the client's fault, 400
    "invalid",  # a parameter makes no sense for this model: 400
    "no_room",  # KV pages or queue are full now: try another worker
    "draining",  # no new work here: try another worker
    "wrong_model",  # the worker serves another model or revision
    "protocol",  # version skew or a malformed frame
    "unauthorized",
    "internal",
]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How tokens are chosen and when a request ends.

    `temperature` 0 is greedy. `seed` is always set by the router (a random one when the client gave
    none): the random number for output position i depends on (seed, i) alone, so a request that
    moves to another worker continues with the same tokens. `logprobs` is the number of
    alternatives reported beside the chosen token, or None for no logprobs at all. `prompt_logprobs`
    is the same for every token of the prompt but the first; such a prompt is computed in full by
    the worker that has the request, without a prefix cache.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    logit_bias: dict[int, float] = {}
    logprobs: int | None = None
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    min_tokens: int = 0
    prompt_logprobs: int | None = None


class PrefillPeer(msgspec.Struct, frozen=True, array_like=True):
    """A prefill worker that may compute a prompt: its id and its bootstrap address."""

    worker_id: str
    host: str
    port: int


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Natural-log probability of one chosen token, and of the most likely ones, best first."""

    logprob: float
    top_ids: list[int] = []
    top_logprobs: list[float] = []


# --- router to worker -----------------------------------------------------------------------------


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """The first frame of a connection."""

    router_id: str
    protocol: int = PROTOCOL


class Submit(msgspec.Struct, frozen=True, kw_only=True, tag="submit"):
    """Run one sequence.

    `tokens` is the prompt followed by the tokens that were already streamed to the client (none at
    the first attempt); `num_prompt_tokens` says where the prompt ends, so penalties, `max_tokens`
    and the sampler's positions carry over. `prefill` lists the prefill workers to ask, best first;
    empty means that the worker prefills by itself. `rid` is unique per attempt.

    `ttft_seconds` and `tbt_seconds` are the objectives of the request's SLO class; 0: none.
    """

    rid: str
    tokens: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    prefill: list[PrefillPeer] = []
    priority: int = 0  # larger runs first
    slo_class: str = ""
    cache_salt: str = ""
    deadline_seconds: float = 0.0  # give up when no token came by then; 0: none
    ttft_seconds: float = 0.0  # what is left until the first token should be there
    tbt_seconds: float = 0.0  # how long the 95th percentile of its gaps may be


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """The client left or a stop string was hit; no further tokens are wanted."""

    rid: str


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    """Heartbeat; the other side answers with the same number."""

    number: int


# --- worker to router -----------------------------------------------------------------------------


class Welcome(msgspec.Struct, frozen=True, kw_only=True, tag="welcome"):
    """What a worker is. `boot_id` changes with every start of the process."""

    worker_id: str
    boot_id: str
    role: Role
    model: str
    compatibility_hash: str
    max_model_len: int
    page_size: int
    num_blocks: int
    vocab_size: int
    eos_token_ids: list[int]
    bootstrap_host: str
    bootstrap_port: int
    protocol: int = PROTOCOL
    salt_parts: list[str] = []  # `salt_hash(*salt_parts, cache_salt)` starts the block hash chains


class StepItem(msgspec.Struct, frozen=True, array_like=True):
    """New tokens of one request; `finish` is empty while it runs.

    `prompt_logprobs` come before the first token, in items without tokens or with it: those of the
    prompt's second token and on, in order, each once.
    """

    rid: str
    tokens: list[int]
    finish: FinishReason | Literal[""] = ""
    logprobs: list[TokenLogprobs] | None = None
    num_cached_tokens: int = 0  # set with the first token: prompt tokens found in a prefix cache
    prefill_worker: str = ""  # set with the first token: who computed the prompt ("" = this worker)
    kv_bytes: int = 0  # set with the first token: KV bytes received for this request
    error: str = ""  # with finish "error": what happened
    prompt_logprobs: list[TokenLogprobs] | None = None


class Step(msgspec.Struct, frozen=True, tag="step"):
    """The tokens of one engine step, all requests of this router in one frame."""

    items: list[StepItem]


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """A typed answer to a `Submit` (or, with an empty rid, to a `Hello`) that will not be run."""

    rid: str
    code: RefusalCode
    message: str
    retry_after_seconds: float = 0.0


class WorkerState(msgspec.Struct, frozen=True, kw_only=True, tag="state"):
    """Load and mode of a worker, for routing; a snapshot, newest wins."""

    role: Role
    draining: bool = False
    num_running: int = 0
    num_waiting: int = 0
    queued_prompt_tokens: int = 0  # uncached prompt tokens that wait for or are in prefill here
    queued_prompt_seconds: float = 0.0  # their time at the measured prefill rate
    num_free_blocks: int = 0
    num_blocks: int = 0
    step_seconds: float = 0.0  # recent mean of a decode step
    prefill_tokens_per_second: float = 0.0  # recent mean; 0: not measured yet
    num_leases: int = 0


class KvEvents(msgspec.Struct, frozen=True, tag="kv"):
    """Blocks that entered or left the prefix cache; `sequence` has no gaps per boot."""

    sequence: int
    stored: list[int] = []
    removed: list[int] = []
    cleared: bool = False


class Pong(msgspec.Struct, frozen=True, tag="pong"):
    """Answer to a `Ping`."""

    number: int


RouterMessage = Hello | Submit | Cancel | Ping
WorkerMessage = Welcome | Step | Refused | WorkerState | KvEvents | Pong
