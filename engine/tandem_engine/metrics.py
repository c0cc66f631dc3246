"""Every metric of a worker: the core counts by these names, and the server exports them."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Final, Literal, NewType, get_args

from tandem_wire.messages import FinishReason, RefusalCode

Counter = NewType("Counter", str)
Gauge = NewType("Gauge", str)
Histogram = NewType("Histogram", str)

PREFIX: Final = "tandem_"
"""Before every name in the text form of Prometheus."""

RATE_WEIGHT: Final = 0.2
"""Weight of the newest sample in a running mean."""
MIN_RATE_TOKENS: Final = 32
"""Steps with fewer prompt tokens say nothing about the prefill rate."""


@dataclass(frozen=True, slots=True)
class Metric:
    """What a name stands for. A labelled one is written `name{label="value",…}`."""

    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()


METRICS: Final[dict[str, Metric]] = {}
"""By name, without the prefix."""


def _counter(name: str, help_: str, *labels: str) -> Counter:
    METRICS[name] = Metric("counter", help_, labels)
    return Counter(name)


def _gauge(name: str, help_: str, *labels: str) -> Gauge:
    METRICS[name] = Metric("gauge", help_, labels)
    return Gauge(name)


def _histogram(name: str, help_: str) -> Histogram:
    METRICS[name] = Metric("histogram", help_)
    return Histogram(name)


# --- requests -------------------------------------------------------------------------------------

REQUESTS: Final = _counter("requests_total", "Requests that routers sent and the worker took")
REFUSED: Final[dict[str, Counter]] = {
    code: _counter(f"refused_{code}_total", f"Requests refused as {code}")
    for code in get_args(RefusalCode)
}
FINISHED: Final[dict[str, Counter]] = {
    reason: _counter(f"finished_{reason}_total", f"Requests that ended as {reason}")
    for reason in get_args(FinishReason)
}
DEADLINES_MISSED: Final = _counter(
    "deadlines_missed_total", "Requests that had no token at their deadline"
)
PREEMPTIONS: Final = _counter("preemptions_total", "Times a request gave up its KV blocks")
POSTPONED: Final = _counter(
    "postponed_total", "Prompts that let others go first because their TTFT was lost"
)
QUEUE_SECONDS: Final = _histogram("queue_seconds", "Wait of a request for KV blocks")
PREFILL_SECONDS: Final = _histogram("prefill_seconds", "Prefill of a prompt on this worker")
QUEUE_LENGTH: Final = _gauge("queue_length", "Requests that wait for KV blocks")
PREFILLING: Final = _gauge("prefilling", "Prompts in prefill")
DECODING: Final = _gauge("decoding", "Sequences that decode")

# --- steps ----------------------------------------------------------------------------------------

STEPS: Final = _counter("steps_total", "Engine steps")
PREFILL_TOKENS: Final = _counter("prefill_tokens_total", "Prompt tokens computed")
DECODE_TOKENS: Final = _counter("decode_tokens_total", "Tokens that decodes gave")
STEP_SECONDS: Final = _histogram("step_seconds", "Duration of a step")
STEP_BATCH_SIZE: Final = _histogram("step_batch_size", "Sequences in a step")
DECODE_STEP_SECONDS: Final = _gauge(
    "decode_step_seconds", "Recent mean duration of steps without prompt tokens"
)
PREFILL_RATE: Final = _gauge(
    "prefill_tokens_per_second", "Recent mean rate of steps with prompt tokens"
)
STEP_TIME_ERROR: Final = _gauge(
    "step_time_error_ratio", "Recent mean error of the learned durations of steps with prompts"
)
BUDGETED_STEPS: Final = _counter(
    "budgeted_steps_total", "Steps whose prompts were cut for the TBT of the decodes beside them"
)
LONG_STEPS: Final = _counter(
    "long_steps_total", "Steps with prompts that were not cut for TBT, so that prompts keep TTFT"
)
QUEUED_PROMPT_TOKENS: Final = _gauge(
    "queued_prompt_tokens", "Prompt tokens that this worker has still to compute"
)
QUEUED_PROMPT_SECONDS: Final = _gauge(
    "queued_prompt_seconds", "Time to compute them at the recent rate"
)

# --- the cache ------------------------------------------------------------------------------------

PREFIX_QUERY_TOKENS: Final = _counter(
    "prefix_query_tokens_total", "Tokens looked up in the prefix cache"
)
PREFIX_HIT_TOKENS: Final = _counter("prefix_hit_tokens_total", "Tokens found in the prefix cache")
PREFIX_CACHE_BLOCKS: Final = _gauge("prefix_cache_blocks", "KV blocks in the prefix index")
KV_BLOCKS: Final = _gauge("kv_blocks", "KV blocks of this worker")
KV_USAGE: Final = _gauge("kv_usage_ratio", "Share of KV blocks that sequences hold")
KV_LEDGER_BLOCKS: Final = _gauge("kv_ledger_blocks", "KV blocks by their use in the ledger", "use")

# --- the hand-off as the scheduler sees it --------------------------------------------------------

TRANSFERS: Final = _counter("transfers_total", "Prompts computed by a prefill worker for this one")
TRANSFER_FAILURES: Final = _counter(
    "transfer_failures_total", "Prompts that every prefill worker failed at"
)
TRANSFER_BYTES: Final = _counter("transfer_received_bytes_total", "KV received for prompts")
TRANSFER_SECONDS: Final = _histogram("transfer_seconds", "Time in which a prompt's KV arrived")
FETCH_SECONDS: Final = _histogram("fetch_seconds", "Time from asking for KV to having it")
FETCHING: Final = _gauge("fetching", "Requests that wait for KV of a prefill worker")
REMOTE_PREFILLS: Final = _counter("remote_prefills_total", "Prompts taken for decode workers")
PREFILLS_REFUSED: Final = _counter("prefills_refused_total", "Prompts of decode workers refused")
REMOTE_QUEUE_SECONDS: Final = _histogram(
    "remote_queue_seconds", "Wait of a decode worker's prompt for KV blocks"
)
REMOTE_PREFILL_SECONDS: Final = _histogram(
    "remote_prefill_seconds", "Prefill of a decode worker's prompt"
)
REMOTE_QUEUE_LENGTH: Final = _gauge(
    "remote_queue_length", "Prompts of decode workers that wait for KV blocks"
)
PUSHING: Final = _gauge("pushing", "Computed prompts whose KV is on its way")

# --- the hand-off itself; `handoff` counts by these names -----------------------------------------

for _name, _help, *_labels in (
    ("kv_fetches_total", "Fetches by outcome", "outcome"),
    ("kv_attempt_failures_total", "Attempts at a prefill worker that failed"),
    ("kv_dials_total", "Connections opened to prefill workers"),
    ("kv_dial_failures_total", "Connections to prefill workers that could not be opened"),
    ("kv_transfer_bytes_total", "KV moved", "backend", "direction"),
    ("kv_transfer_seconds_total", "Time in which KV was moved", "backend"),
    ("kv_checksum_errors_total", "KV that did not match its checksum"),
    ("kv_link_faults_total", "Transfers whose KV came damaged or not at all"),
    ("kv_pairs_taken_out_total", "Times a prefill worker was taken out of use for its link faults"),
    ("kv_stale_writes_total", "Writes of an old epoch that were dropped"),
    ("kv_push_failures_total", "Pushes that failed"),
    ("kv_fences_total", "Epochs fenced for decode workers"),
    ("kv_expired_leases_total", "Leases of silent decode workers that ran out"),
    ("kv_lost_leases_total", "Leases freed because their decode worker was gone"),
    ("kv_refused_pairings_total", "Handshakes refused"),
    ("kv_transport_failures_total", "Transports that could not be opened for a pairing"),
    ("kv_faults_injected_total", "Faults injected by TANDEM_FAULTS", "step", "fault"),
    ("kv_internal_errors_total", "Fetches that a fault of this worker ended"),
):
    _counter(_name, _help, *_labels)
_gauge("kv_pair_out_of_use", "Prefill workers with link faults: whether they rest", "peer")
_gauge("kv_sessions", "Open sessions with other workers", "backend", "side")
LEASES: Final = _gauge("leases", "Fetches and pushes that are not finished")

# --- the worker -----------------------------------------------------------------------------------

DRAINING: Final = _gauge("draining", "Whether the worker takes no new work because it drains")
WORKER_INFO: Final = _gauge(
    "worker_info", "The worker; always 1", "worker", "model", "role", "boot"
)
WORKER_READY: Final = _gauge("worker_ready", "Takes new work")


class Meter:
    """Totals since the start, samples since the last report, and recent means."""

    def __init__(self) -> None:
        self.counters: defaultdict[str, float] = defaultdict(float)
        self._observations: defaultdict[str, list[float]] = defaultdict(list)
        self.step_seconds = 0.0  # recent mean of steps without prompt tokens
        self.prefill_rate = 0.0  # prompt tokens per second of steps that have some; 0: not measured

    def count(self, name: Counter, amount: float = 1.0) -> None:
        """Add to a total."""
        self.counters[name] += amount

    def observe(self, name: Histogram, value: float) -> None:
        """Add a sample."""
        self._observations[name].append(value)

    def take_observations(self) -> dict[str, list[float]]:
        """Samples since the last call."""
        taken = dict(self._observations)
        self._observations.clear()
        return taken

    def record_step(
        self, seconds: float, num_items: int, num_decoded: int, num_prompt: int
    ) -> None:
        """One executed step: its duration, its items, their decoded and their prompt tokens."""
        self.observe(STEP_SECONDS, seconds)
        self.observe(STEP_BATCH_SIZE, num_items)
        self.count(STEPS)
        self.count(PREFILL_TOKENS, num_prompt)
        self.count(DECODE_TOKENS, num_decoded)
        if num_prompt == 0:
            self.step_seconds = _mean(self.step_seconds, seconds)
        elif num_prompt >= MIN_RATE_TOKENS and seconds > 0:
            self.prefill_rate = _mean(self.prefill_rate, num_prompt / seconds)


def _mean(old: float, new: float) -> float:
    return new if old == 0 else old + RATE_WEIGHT * (new - old)
