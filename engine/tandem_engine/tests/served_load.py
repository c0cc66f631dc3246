"""A worker under an open load in simulated time: the real core, a modelled runner, no waiting."""

import random
from dataclasses import dataclass, field
from itertools import pairwise

from tandem_engine.config import WorkerConfig
from tandem_engine.core.engine_core import EngineCore
from tandem_engine.frames import CoreStep, FromCore, RoutedSubmit
from tandem_engine.mock.latency import MockProfile
from tandem_engine.mock.runner import MockRunner
from tandem_engine.scheduler.step_times import StepLoad
from tandem_engine.step import Batch, SampledTokens, StepShapes
from tandem_engine.tests.fleet import Clock
from tandem_engine.tests.loopback import LoopbackHandoff, Network
from tandem_wire.messages import SamplingParams, Submit

PAGE = 64
H200 = MockProfile(
    name="h200-8b",
    blocks=8000,
    max_len=16384,
    decode_base=3.9e-3,
    decode_per_sequence=5e-6,
    decode_per_context_token=4.6e-8,
    prefill_base=2e-3,
    prefill_per_token=2.25e-5,
    prefill_per_token_squared=2.6e-10,
)
"""Llama-3.1-8B's shape on one H200: 2,048 prompt tokens beside some decodes take about 50 ms."""


class ModelledRunner(MockRunner):
    """Moves the clock by what a step takes, and computes tokens of no meaning."""

    def __init__(self, profile: MockProfile, clock: Clock, shapes: StepShapes) -> None:
        super().__init__(profile, page_size=PAGE)
        self.shapes = shapes
        self._clock = clock
        self._random = random.Random(0)
        self.slow_down = 1.0
        self.loads: list[tuple[StepLoad, float]] = []

    def execute(self, batch: Batch) -> list[SampledTokens | None]:
        decodes = [item.end for item in batch.items if len(item.tokens) == 1]
        chunks = [(item.start, item.end) for item in batch.items if len(item.tokens) > 1]
        seconds = self.profile.step_seconds(decodes, chunks) * self.slow_down
        seconds *= self._random.uniform(0.98, 1.02)
        self._clock.now += seconds
        self.loads.append((StepLoad.of(batch.items), seconds))
        return [SampledTokens([40]) if item.sample else None for item in batch.items]


@dataclass
class Served:
    """What became of one request."""

    sent: float
    times: list[float] = field(default_factory=list)

    @property
    def ttft(self) -> float:
        return self.times[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        return sorted(b - a for a, b in pairwise(self.times))

    def p95_gap(self) -> float:
        gaps = self.gaps
        return gaps[min(int(0.95 * len(gaps)), len(gaps) - 1)]


@dataclass(frozen=True, kw_only=True)
class Load:
    """Requests that arrive at random times, and what they ask for."""

    rate: float
    seconds: float = 8.0
    num_input: int = 1024
    num_output: int = 256
    ttft: float = 0.0
    tbt: float = 0.0
    priority: int = 0


class SimulatedWorker:
    """One core whose clock moves only by its steps and by waiting for arrivals."""

    def __init__(self, profile: MockProfile = H200, shapes: StepShapes | None = None, **flags: int):
        self.clock = Clock()
        values = {"page_size": PAGE, "max_batched_tokens": 2048, "max_running": 256, **flags}
        config = WorkerConfig(model="mock://tiny", max_waiting=4096, **values)  # type: ignore[arg-type]
        self.runner = ModelledRunner(profile, self.clock, shapes or StepShapes())
        handoff = LoopbackHandoff("w", self.runner.kv, Network())
        self.core = EngineCore(
            config.resolve_auto({}), self.runner, handoff, self._take, lambda: self.clock.now
        )
        self.served: dict[str, Served] = {}

    def _take(self, frame: FromCore) -> None:
        if isinstance(frame, CoreStep):
            for routed in frame.routed:
                for item in routed.items:
                    assert not item.error, item.error
                    self.served[item.rid].times += [self.clock.now] * len(item.tokens)

    def submit(self, rid: str, load: Load, rng: random.Random, at: float) -> None:
        tokens = [rng.randrange(1, 500) for _ in range(load.num_input)]
        params = SamplingParams(max_tokens=load.num_output, temperature=0.0, ignore_eos=True)
        self.served[rid] = Served(at)
        submit = Submit(
            rid=rid,
            tokens=tokens,
            num_prompt_tokens=len(tokens),
            params=params,
            priority=load.priority,
            ttft_seconds=load.ttft,
            tbt_seconds=load.tbt,
        )
        self.core.post(RoutedSubmit(1, submit))

    def run(self, load: Load, seed: int = 1, prefix: str = "r") -> list[Served]:
        """All requests of a load, to their last tokens."""
        rng = random.Random(seed)
        start = now = self.clock.now
        arrivals: list[float] = []
        while (now := now + rng.expovariate(load.rate)) < start + load.seconds:
            arrivals.append(now)
        rids = [f"{prefix}{number}" for number in range(len(arrivals))]
        num_sent = 0
        while num_sent < len(arrivals) or self.core.scheduler.has_work:
            while num_sent < len(arrivals) and arrivals[num_sent] <= self.clock.now:
                self.submit(rids[num_sent], load, rng, arrivals[num_sent])
                num_sent += 1
            if not self.core.run_once() and num_sent < len(arrivals):
                self.clock.now = max(self.clock.now, arrivals[num_sent])
        return [self.served[rid] for rid in rids]


def goodput(served: list[Served], ttft: float, tbt: float) -> float:
    """Share of requests that kept both objectives: TTFT and the 95th percentile of their gaps."""
    good = sum(each.ttft <= ttft and each.p95_gap() <= tbt for each in served)
    return good / len(served)
