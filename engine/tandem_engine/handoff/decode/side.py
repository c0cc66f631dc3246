"""The decode side: fetches KV from the first prefill worker that delivers."""

import asyncio
import itertools
import statistics
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

import msgspec

from tandem_engine.frames import HeldFetch, Pairing, PairTrouble, ProbeRequest, ProbeResult
from tandem_engine.handoff.decode.dialler import Dialler
from tandem_engine.handoff.decode.exchange import Exchange
from tandem_engine.handoff.decode.peers import PeerPool
from tandem_engine.handoff.decode.session import Attempt, DecodeSession
from tandem_engine.handoff.errors import AttemptFailed, FetchStopped, LinkFault
from tandem_engine.handoff.events import (
    Counters,
    FetchDone,
    FetchFailed,
    FetchRequest,
    FromHandoff,
)
from tandem_engine.handoff.injection import Injector
from tandem_engine.handoff.pages import MAX_PROBE_BYTES, KVPages, PatternPages
from tandem_engine.handoff.settings import HandoffSettings
from tandem_engine.handoff.transports.registry import Transports
from tandem_engine.step import KVStore
from tandem_wire.handoff import Commit, Prefill, Probe
from tandem_wire.messages import PrefillPeer

R = TypeVar("R")
NUM_LATENCIES: Final = 5
"""A probe asks so many times for one block."""


class _Fetch:
    """A request that is under way, and the means to stop it."""

    def __init__(self, request: FetchRequest) -> None:
        self.request = request
        self.stopped: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.attempt: Attempt | None = None
        self.task: asyncio.Task[None] | None = None

    def stop(self, why: str) -> None:
        """Fail the attempt that is under way, and begin no other one."""
        if not self.stopped.done():
            self.stopped.set_result(None)
        if self.attempt is not None:
            self.attempt.fail(FetchStopped(why))

    async def unless_stopped(self, work: Awaitable[R]) -> R:
        """Wait for `work`, or raise FetchStopped."""
        task = asyncio.ensure_future(work)
        either: list[asyncio.Future[Any]] = [task, self.stopped]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            await asyncio.wait([task])
            raise FetchStopped("cancelled")
        return task.result()


class DecodeSide:
    """All fetches in which this worker is D. Lives on the hand-off's loop."""

    def __init__(
        self,
        settings: HandoffSettings,
        kv: KVStore,
        compatibility_hash: str,
        transports: Transports,
        report: Callable[[FromHandoff], None],
        counters: Counters,
        injector: Injector | None = None,
    ) -> None:
        self._settings = settings
        self._layout = kv.layout
        self._pages = KVPages(kv)
        self._report = report
        self._counters = counters
        self._loop = asyncio.get_running_loop()
        self._exchange = Exchange(settings, kv.layout, counters)
        dialler = Dialler(settings, kv, compatibility_hash, transports, self._exchange, injector)
        # One sequence for the whole process: an epoch names one attempt of one request.
        self._epochs = itertools.count(1)
        self._peers = PeerPool(dialler.open, self._check, settings, counters)
        self._fetches: dict[str, _Fetch] = {}
        self._probes: set[asyncio.Task[None]] = set()

    def pairings(self) -> list[Pairing]:
        """The prefill workers that are connected."""
        return self._peers.pairings()

    def troubles(self) -> list[PairTrouble]:
        """The prefill workers whose KV came damaged or not at all."""
        return self._peers.troubles()

    async def _check(self, session: DecodeSession) -> None:
        await self._exchange.check(session, self._epochs)

    def held(self) -> list[HeldFetch]:
        """The epochs that prefill workers may write to."""
        return self._peers.held()

    def num_stale_writes(self) -> int:
        """Count the writes of fenced epochs that were dropped."""
        return self._peers.num_stale_writes()

    # --- fetches ----------------------------------------------------------------------------------

    def fetch(self, request: FetchRequest) -> None:
        """Begin a fetch; it ends in one `FetchDone` or `FetchFailed`."""
        fetch = _Fetch(request)
        self._fetches[request.rid] = fetch
        fetch.task = self._loop.create_task(self._run(fetch))

    def cancel(self, rid: str) -> None:
        """Stop a fetch whose client left; one that is over has already reported."""
        fetch = self._fetches.get(rid)
        if fetch is not None:
            fetch.stop("cancelled")

    async def _run(self, fetch: _Fetch) -> None:
        result: FetchDone | FetchFailed
        try:
            result = await self._try_peers(fetch)
        except Exception as error:
            self._counters.add("kv_internal_errors_total")
            result = FetchFailed(fetch.request.rid, f"{type(error).__name__}: {error}")
        del self._fetches[fetch.request.rid]
        outcome = "done" if isinstance(result, FetchDone) else "failed"
        self._counters.add("kv_fetches_total", outcome=outcome)
        self._report(result)

    async def _try_peers(self, fetch: _Fetch) -> FetchDone | FetchFailed:
        request = fetch.request
        failures = []
        for peer in request.peers:
            if fetch.stopped.done():
                break
            try:
                session = await fetch.unless_stopped(self._peers.session(peer))
                try:
                    return await self._attempt(fetch, session)
                except LinkFault as fault:
                    self._peers.note_fault(peer, session, str(fault))
                    raise
            except AttemptFailed as failure:
                failures.append(f"{peer.worker_id or peer.host}: {failure}")
                self._counters.add("kv_attempt_failures_total")
        return FetchFailed(
            request.rid, "; ".join(failures) or "the request names no prefill worker"
        )

    async def _attempt(self, fetch: _Fetch, session: DecodeSession) -> FetchDone:
        request = fetch.request
        epoch = next(self._epochs)
        started = self._loop.time()
        prefill = Prefill(
            rid=request.rid,
            epoch=epoch,
            tokens=list(request.tokens),
            num_prompt_tokens=request.num_prompt_tokens,
            num_skip_tokens=request.num_skip_tokens,
            blocks=list(request.blocks),
            params=request.params,
            priority=request.priority,
            cache_salt=request.cache_salt,
            lease_seconds=self._settings.lease_seconds,
        )
        attempt = fetch.attempt = Attempt()
        try:
            commit = await self._exchange.receive(session, prefill, attempt, self._pages)
        finally:
            fetch.attempt = None
        if commit.num_tokens != len(request.tokens):
            raise AttemptFailed(
                f"the prefill worker committed {commit.num_tokens} of {len(request.tokens)} tokens"
            )
        seconds = self._loop.time() - started
        self._counters.add(
            "kv_transfer_bytes_total",
            commit.num_bytes,
            direction="in",
            backend=session.inbound.name,
        )
        self._counters.add("kv_transfer_seconds_total", seconds, backend=session.inbound.name)
        return FetchDone(
            rid=request.rid,
            first_token=commit.first_token,
            first_logprobs=commit.first_logprobs,
            worker_id=session.worker_id,
            num_cached_tokens=commit.num_cached_tokens,
            num_bytes=commit.num_bytes,
            seconds=seconds,
            transport=session.inbound.name,
        )

    # --- probes -----------------------------------------------------------------------------------

    def probe(self, request: ProbeRequest) -> None:
        """Begin a probe; it ends in one `ProbeResult`. Neither side's blocks are touched."""
        task = self._loop.create_task(self._run_probe(request))
        self._probes.add(task)
        task.add_done_callback(self._probes.discard)

    async def _run_probe(self, request: ProbeRequest) -> None:
        result = ProbeResult(number=request.number)
        peer = PrefillPeer("", request.host, request.port)
        session: DecodeSession | None = None
        try:
            if not 0 < request.num_blocks * self._layout.block_bytes <= MAX_PROBE_BYTES:
                raise AttemptFailed(
                    f"invalid: a probe of {request.num_blocks} blocks is not possible; "
                    f"ask for at least 1 and at most {MAX_PROBE_BYTES} bytes"
                )
            session = await self._peers.session(peer, at_once=True)
            result = msgspec.structs.replace(
                result,
                worker_id=session.worker_id,
                transport=session.inbound.name,
                passed_over=session.pairing.passed_over,
                shortfalls=session.pairing.shortfalls,
            )
            result = await self._measure(session, request.num_blocks, result)
        except AttemptFailed as failure:
            if session is not None and isinstance(failure, LinkFault):
                self._peers.note_fault(peer, session, str(failure))
            result = msgspec.structs.replace(result, error=str(failure))
        self._report(result)

    async def _measure(
        self, session: DecodeSession, num_blocks: int, result: ProbeResult
    ) -> ProbeResult:
        """Time single blocks, then all at once. Raises AttemptFailed."""
        latencies = []
        for _ in range(NUM_LATENCIES):
            started = time.perf_counter()
            await self._move_pattern(session, 1)
            latencies.append(time.perf_counter() - started)
        started = time.perf_counter()
        commit, attempt = await self._move_pattern(session, num_blocks)
        assert attempt.landing is not None
        return msgspec.structs.replace(
            result,
            num_bytes=commit.num_bytes,
            seconds=time.perf_counter() - started,
            latency_seconds=statistics.median(latencies),
            send_seconds=commit.transfer_seconds,
            land_seconds=attempt.landing.seconds,
        )

    async def _move_pattern(
        self, session: DecodeSession, num_blocks: int
    ) -> tuple[Commit, Attempt]:
        attempt = Attempt()
        question = Probe(next(self._epochs), num_blocks)
        pattern = PatternPages(self._layout)
        return await self._exchange.receive(session, question, attempt, pattern), attempt

    async def close(self) -> None:
        """Stop every fetch and probe, fence them, and close the connections."""
        for fetch in self._fetches.values():
            fetch.stop("the worker is shutting down")
        tasks = [fetch.task for fetch in self._fetches.values() if fetch.task is not None]
        # A peer that doesn't acknowledge in time is fenced by the end of its connection.
        if tasks:
            await asyncio.wait(tasks, timeout=self._settings.dial_seconds)
        await self._peers.close()
        rest = [task for task in [*tasks, *self._probes] if not task.done()]
        if rest:
            await asyncio.wait(rest)
