"""The engine in this process: scheduler, cache and runner, no processes and no HTTP."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Final

from tandem_bench.errors import EngineError
from tandem_bench.offline.published import OfflineWorkload
from tandem_engine.config import WorkerConfig
from tandem_engine.core.engine_core import EngineCore
from tandem_engine.frames import (
    CoreFailed,
    CoreRefused,
    CoreStats,
    CoreStep,
    FromCore,
    Pairing,
    PairTrouble,
    RoutedSubmit,
)
from tandem_engine.handoff.events import FromHandoff, ToHandoff
from tandem_engine.step import Runner
from tandem_wire.messages import SamplingParams, Submit

PATIENCE_SECONDS: Final = 60.0
"""How long the core may have nothing to run while sequences are unfinished."""
PAUSE_SECONDS: Final = 0.0005
WARMUP_TOKENS: Final = 16
MAX_STEPS_AHEAD: Final = 8


class NoHandoff:
    """The hand-off of a worker without peers."""

    def post(self, event: ToHandoff) -> None:
        """Ignore the event: no one is at the other end."""

    def poll(self) -> list[FromHandoff]:
        """There are no events."""
        return []

    def wake_on_event(self, wake: threading.Event) -> None:
        """There will be no event."""

    def num_leases(self) -> int:
        """There are no leases."""
        return 0

    def counters(self) -> dict[str, float]:
        """There are no counters."""
        return {}

    def gauges(self) -> dict[str, float]:
        """There are no gauges."""
        return {}

    def troubles(self) -> list[PairTrouble]:
        return []

    def pairings(self) -> list[Pairing]:
        """None."""
        return []

    def set_draining(self, draining: bool) -> None:
        """Nothing changes: no one asks for prefills."""

    def close(self) -> None:
        """Nothing is open."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflineResult:
    """The figures of one run, in seconds and tokens."""

    num_seqs: int
    seconds: float
    input_tokens: int
    output_tokens: int
    steps: int
    mean_batch: float
    runner_seconds: float
    """Sum of the steps' durations as the core measures them."""
    preemptions: int
    cached_tokens: int
    """Prompt tokens that the prefix cache held: none, unless prompts of one run share some."""
    first_token_seconds: float
    """Until the first token of all."""

    @property
    def output_per_second(self) -> float:
        """Generated tokens per second: nano-vllm's figure."""
        return self.output_tokens / self.seconds

    @property
    def total_per_second(self) -> float:
        """Prompt and generated tokens per second."""
        return (self.input_tokens + self.output_tokens) / self.seconds

    @property
    def runner_share(self) -> float:
        """Share of the wall time spent in steps; the rest is scheduling and bookkeeping."""
        return min(1.0, self.runner_seconds / self.seconds)

    def to_json(self) -> dict[str, float | int]:
        """Fields and figures."""
        return {
            **asdict(self),
            "output_per_second": self.output_per_second,
            "total_per_second": self.total_per_second,
            "runner_share": self.runner_share,
        }


@dataclass
class _Seen:
    """What the core has sent since the last reset."""

    tokens: int = 0
    first_token: float = 0.0
    unfinished: set[str] = field(default_factory=set)
    steps: int = 0
    items: float = 0.0
    step_seconds: float = 0.0
    preemptions: float = 0.0


class OfflineEngine:
    """Drives an `EngineCore` through `post` and `run_once` alone."""

    def __init__(self, config: WorkerConfig, runner: Runner) -> None:
        self._core = EngineCore(config, runner, NoHandoff(), self._take)
        self._runner = runner
        self._seen = _Seen()
        self._numbers = 0
        self._runs = 0
        self.limits = self._core.limits

    def run(
        self,
        sequences: Sequence[tuple[list[int], int]],
        temperature: float,
        on_progress: Callable[[int, int], None] = lambda done, tokens: None,
    ) -> OfflineResult:
        """Run all sequences at once, to their last token. `on_progress`: sequences done, tokens.

        Raises:
            EngineError: a sequence was refused or failed, or the core came to a standstill.
        """
        self._core.report()  # takes the samples of whatever ran before
        self._seen = seen = _Seen()
        self._runs += 1
        before = dict(self._core.scheduler.meter.counters)
        started = shown = busy = time.perf_counter()
        for prompt, num_output in sequences:
            self._submit(prompt, num_output, temperature)
        while seen.unfinished:
            worked = self._core.run_once()
            now = time.perf_counter()
            if worked:
                busy = now
            elif now - busy > PATIENCE_SECONDS:
                raise EngineError(
                    f"the core has had nothing to run for {PATIENCE_SECONDS:g} s, and "
                    f"{len(seen.unfinished)} sequences are unfinished",
                    "give more room (--kv-memory), or report this with the worker's flags",
                )
            else:
                time.sleep(PAUSE_SECONDS)
            if now - shown > 0.5:
                shown = now
                on_progress(len(sequences) - len(seen.unfinished), seen.tokens)
        seconds = time.perf_counter() - started
        for _ in range(MAX_STEPS_AHEAD):  # what was launched ahead of the last tokens
            if not self._core.run_once():
                break
        self._core.report()
        self._core.check()
        counters = self._core.scheduler.meter.counters

        def counted(name: str) -> int:
            return round(counters.get(name, 0) - before.get(name, 0))

        return OfflineResult(
            num_seqs=len(sequences),
            seconds=seconds,
            input_tokens=sum(len(prompt) for prompt, _ in sequences),
            output_tokens=seen.tokens,
            steps=seen.steps,
            mean_batch=seen.items / seen.steps if seen.steps else 0.0,
            runner_seconds=seen.step_seconds,
            preemptions=counted("preemptions_total"),
            cached_tokens=counted("prefix_hit_tokens_total"),
            first_token_seconds=seen.first_token - started,
        )

    def close(self) -> None:
        """Free what the runner holds."""
        self._runner.close()

    def _submit(self, prompt: list[int], num_output: int, temperature: float) -> None:
        self._numbers += 1
        rid = str(self._numbers)
        self._seen.unfinished.add(rid)
        params = SamplingParams(
            max_tokens=num_output, temperature=temperature, seed=self._numbers, ignore_eos=True
        )
        submit = Submit(
            rid=rid,
            tokens=prompt,
            num_prompt_tokens=len(prompt),
            params=params,
            cache_salt=f"run {self._runs}",  # no run finds the prompts of another cached
        )
        self._core.post(RoutedSubmit(0, submit))

    def _take(self, message: FromCore) -> None:
        seen = self._seen
        match message:
            case CoreStep(routed):
                if not seen.first_token:
                    seen.first_token = time.perf_counter()
                for items in routed:
                    for item in items.items:
                        seen.tokens += len(item.tokens)
                        if item.error:
                            raise EngineError(f"sequence {item.rid} failed: {item.error}")
                        if item.finish:
                            seen.unfinished.discard(item.rid)
            case CoreStats(observations=observations):
                durations = observations.get("step_seconds", [])
                seen.steps += len(durations)
                seen.step_seconds += sum(durations)
                seen.items += sum(observations.get("step_batch_size", []))
            case CoreRefused(refused=refused):
                raise EngineError(
                    f"the engine refused a sequence: {refused.message}",
                    "give more room (--max-model-len, --kv-memory), or shorter sequences",
                )
            case CoreFailed(text):
                raise EngineError(text)
            case _:
                pass  # block events and probes are for routers


def warm_up(
    engine: OfflineEngine, workload: OfflineWorkload, vocab_size: int, num_seqs: int
) -> None:
    """At most the workload's sequences, from another seed, 1 to `WARMUP_TOKENS` tokens each.

    Whatever is compiled, captured or chosen at the first use of a shape is then there: steps with
    several prompts, and decodes of every number of rows from the first down to one.
    """
    if num_seqs:
        fewer = min(num_seqs, workload.num_seqs)
        drawn = replace(workload, num_seqs=fewer, seed=workload.seed + 1).draw(vocab_size)
        short = [
            (prompt, min(length, 1 + number % WARMUP_TOKENS))
            for number, (prompt, length) in enumerate(drawn)
        ]
        engine.run(short, workload.temperature)


def check_fits(workload: OfflineWorkload, engine: OfflineEngine) -> None:
    """Raise EngineError when the longest sequence can't run."""
    longest, limits = workload.input_range[1] + workload.output_range[1], engine.limits
    if longest > limits.max_model_len:
        raise EngineError(
            f"sequences of up to {longest} tokens don't fit this engine's limit of "
            f"{limits.max_model_len} tokens",
            "shorten --input-len and --output-len, or raise --max-model-len and --kv-memory",
        )
