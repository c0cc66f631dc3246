"""Cores with mock runners in one thread, and what their routers would have seen."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from tandem_engine.config import WorkerConfig
from tandem_engine.core.engine_core import EngineCore
from tandem_engine.frames import (
    CoreRefused,
    CoreStats,
    CoreStep,
    FromCore,
    RoutedSubmit,
)
from tandem_engine.metrics import METRICS
from tandem_engine.mock.runner import _START as START_HASH
from tandem_engine.mock.runner import EOS_TOKEN, extend_hash, load_mock_runner, next_token
from tandem_engine.server.metrics import split_name
from tandem_engine.step import Batch, BatchItem, PendingStep, Runner, SampledTokens
from tandem_engine.tests.loopback import LoopbackHandoff, Network
from tandem_wire.messages import KvEvents, PrefillPeer, SamplingParams, StepItem, Submit


@dataclass
class Stream:
    """Everything that came back for one rid."""

    tokens: list[int] = field(default_factory=list)
    items: list[StepItem] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


class Clock:
    """Time that moves when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class LateStep(PendingStep):
    """A step that runs when its results are asked for: after the next one was launched."""

    runner: Runner
    batch: Batch
    before: list[SampledTokens | None]
    """The results of the step before, which `wait` of that one fills in."""
    results: list[SampledTokens | None] = field(default_factory=list)

    def wait(self) -> list[SampledTokens | None]:
        for item in self.batch.items:
            if item.previous >= 0:
                sampled = self.before[item.previous]
                assert sampled is not None
                item.tokens, item.previous = sampled.tokens, -1
        self.results += self.runner.execute(self.batch)
        return self.results


class _Wrapper(Runner):
    """A runner on top of another one."""

    def __init__(self, inner: Runner) -> None:
        self._inner = inner
        self.vocab_size, self.eos_token_ids = inner.vocab_size, inner.eos_token_ids
        self.max_model_len, self.num_blocks = inner.max_model_len, inner.num_blocks
        self.step_tokens = inner.step_tokens
        self.kv = inner.kv

    def close(self) -> None:
        self._inner.close()


class SeveralRunner(_Wrapper):
    """Gives each sequence up to `step_tokens` tokens a step: a random number, from 1 on.

    They are what the inner runner gives one by one, and so is their KV.
    """

    def __init__(self, inner: Runner, step_tokens: int, rng: random.Random) -> None:
        super().__init__(inner)
        self.step_tokens = step_tokens
        self._rng = rng
        self.num_extra = 0

    def execute(self, batch: Batch) -> list[SampledTokens | None]:
        results = self._inner.execute(batch)
        page = self.kv.layout.page_size
        for item, result in zip(batch.items, results, strict=True):
            if result is None:
                continue
            room = len(item.block_table) * page - item.end
            for extra in range(min(self._rng.randrange(self.step_tokens), room)):
                (found,) = self._inner.execute(Batch([_after(item, result.tokens, extra)]))
                assert found is not None
                result.tokens += found.tokens
                if result.logprobs is not None and found.logprobs is not None:
                    result.logprobs += found.logprobs
                self.num_extra += 1
        return results


def _after(item: BatchItem, tokens: list[int], extra: int) -> BatchItem:
    """The item that computes the KV of the last of `tokens`, all sampled in this step."""
    return replace(
        item,
        tokens=tokens[-1:],
        start=item.end + extra,
        output_tokens=[*item.output_tokens, *tokens],
    )


class LateRunner(_Wrapper):
    """A runner like a GPU's, on top of one that isn't."""

    plans_ahead = True

    def __init__(self, inner: Runner) -> None:
        super().__init__(inner)
        self._last: LateStep | None = None
        self.num_ahead = 0

    def launch(self, batch: Batch) -> PendingStep:
        before = self._last.results if self._last is not None else []
        # A block table is what it is now: its sequence may have ended by the time the step runs.
        items = [replace(item, block_table=list(item.block_table)) for item in batch.items]
        self._last = LateStep(self._inner, Batch(items, batch.copies, batch.scored), before)
        self.num_ahead += any(item.previous >= 0 for item in batch.items)
        return self._last

    def execute(self, batch: Batch) -> list[SampledTokens | None]:
        return self.launch(batch).wait()


def check_names(stats: CoreStats) -> None:
    """Every name in a report is in the table of metrics, with its kind and its labels."""
    for kind, names in (
        ("counter", stats.counters),
        ("gauge", stats.gauges),
        ("histogram", stats.observations),
    ):
        for full_name in names:
            name, labels = split_name(full_name)
            assert METRICS[name].kind == kind, full_name
            assert set(METRICS[name].labels) == set(labels), full_name


class Worker:
    """One core, driven by hand."""

    def __init__(
        self,
        name: str,
        network: Network,
        clock: Callable[[], float],
        *,
        late: bool = False,
        step_tokens: int = 1,
        open_runner: Callable[[WorkerConfig], Runner] = load_mock_runner,
        **flags: Any,
    ) -> None:
        flags.setdefault("model", "mock://tiny?blocks=64&max_len=1024")
        flags.setdefault("page_size", 8)
        flags.setdefault("chunk_tokens", 32)
        flags.setdefault("max_batched_tokens", 64)
        flags.setdefault("max_running", 16)
        flags.setdefault("local_prefill_tokens", 16)
        self.name = name
        self.config = WorkerConfig(**flags).resolve_auto({"POD_NAME": name})
        runner = open_runner(self.config)
        if step_tokens > 1:
            runner = SeveralRunner(runner, step_tokens, random.Random(name))
        self.runner: Runner = LateRunner(runner) if late else runner
        self.handoff = LoopbackHandoff(name, self.runner.kv, network)
        self.frames: list[FromCore] = []
        self.streams: dict[str, Stream] = {}
        self.core = EngineCore(self.config, self.runner, self.handoff, self._take, clock)

    def _take(self, frame: FromCore) -> None:
        self.frames.append(frame)
        if isinstance(frame, CoreStep):
            for routed in frame.routed:
                for item in routed.items:
                    stream = self.streams.setdefault(item.rid, Stream())
                    assert not stream.ends, f"{item.rid}: news after the end"
                    stream.items.append(item)
                    stream.tokens.extend(item.tokens)
                    if item.finish:
                        stream.ends.append(item.finish)
        elif isinstance(frame, CoreRefused):
            stream = self.streams.setdefault(frame.refused.rid, Stream())
            assert not stream.ends
            stream.ends.append("refused")
            stream.refused.append(frame.refused.code)

    def submit(
        self,
        rid: str,
        tokens: list[int],
        *,
        router: int = 1,
        peers: tuple[str, ...] = (),
        num_prompt_tokens: int | None = None,
        params: dict[str, Any] | None = None,
        **fields: Any,
    ) -> None:
        values: dict[str, Any] = {"max_tokens": 8, "temperature": 0.0, **(params or {})}
        self.core.post(
            RoutedSubmit(
                router,
                Submit(
                    rid=rid,
                    tokens=tokens,
                    num_prompt_tokens=num_prompt_tokens or len(tokens),
                    params=SamplingParams(**values),
                    prefill=[PrefillPeer(peer, "127.0.0.1", 1) for peer in peers],
                    **fields,
                ),
            )
        )

    def step(self) -> bool:
        worked = self.core.run_once()
        self.core.check()
        return worked

    def stats(self) -> CoreStats:
        self.core.report()
        frame = self.frames[-1]
        assert isinstance(frame, CoreStats)
        check_names(frame)
        return frame

    def kv_events(self) -> list[KvEvents]:
        return [frame for frame in self.frames if isinstance(frame, KvEvents)]


class Fleet:
    """Several workers that share a network and a clock."""

    def __init__(self, *names: str, network: Network | None = None, **flags: Any) -> None:
        self.clock = Clock()
        self.network = network or Network()
        self.workers = {name: Worker(name, self.network, self.clock, **flags) for name in names}

    def __getitem__(self, name: str) -> Worker:
        return self.workers[name]

    def step(self) -> bool:
        self.clock.now += 0.01
        worked = [worker.step() for worker in self.workers.values()]
        return any(worked)

    def settle(self, limit: int = 5000) -> None:
        """Step until every request has had its end; time flies while nothing else happens."""
        quiet = 0
        for _ in range(limit):
            quiet = 0 if self.step() else quiet + 1
            cores = [worker.core for worker in self.workers.values()]
            if quiet > 3:
                if not any(
                    list(core.scheduler.requests) or core.scheduler.num_running for core in cores
                ):
                    return
                self.clock.now += 1.0
        raise AssertionError("the fleet never came to rest")


def expected_tokens(
    tokens: list[int], params: SamplingParams, num_prompt: int, eos: int = 0
) -> list[int]:
    """What an undisturbed worker generates after `tokens`."""
    state = extend_hash(START_HASH, tokens)[-1]
    generated = list(tokens[num_prompt:])
    while len(generated) < params.max_tokens:
        token = next_token(state, params, len(generated), eos)
        generated.append(token)
        state = extend_hash(state, [token])[-1]
        stops = set(params.stop_token_ids) | (set() if params.ignore_eos else {EOS_TOKEN})
        if token in stops and len(generated) > params.min_tokens:
            break
    return generated[len(tokens) - num_prompt :]


def prompt(length: int, start: int = 0) -> list[int]:
    return [32 + (start + i * 7) % 95 for i in range(length)]


def ends(fleet: Fleet, name: str) -> dict[str, str]:
    return {rid: stream.ends[0] for rid, stream in fleet[name].streams.items() if stream.ends}


def posted(fleet: Fleet, name: str, kind: type) -> list[Any]:
    return [event for event in fleet[name].handoff.posted if isinstance(event, kind)]


def assert_clean(fleet: Fleet) -> None:
    for worker in fleet.workers.values():
        stats = worker.stats()
        assert stats.ledger["owned"] == stats.ledger["leased"] == stats.ledger["leaked"] == 0
        assert stats.state.num_running == stats.state.num_waiting == stats.state.num_leases == 0
