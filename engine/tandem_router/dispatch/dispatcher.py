"""Places sequences on workers, keeps those that must wait, and gives up in time."""

import asyncio
import contextlib
from typing import Final

import structlog

from tandem_router.config import RouterConfig
from tandem_router.dispatch.sequence import Sequence
from tandem_router.errors import NoWorker, Overloaded, RouterError
from tandem_router.metrics import RouterMetrics
from tandem_router.policy.base import Placement, Policy
from tandem_router.workers.fleet import Fleet
from tandem_router.workers.link import WorkerLink
from tandem_wire.errors import WireError
from tandem_wire.messages import PrefillPeer, Welcome

MAX_PREFILL_PEERS: Final = 3
RETRY_TICK_SECONDS: Final = 0.1
MAX_WAITING: Final = 4096

log = structlog.get_logger(__name__)


class Dispatcher:
    """Owns every sequence that is under way in this router."""

    def __init__(
        self, config: RouterConfig, fleet: Fleet, policy: Policy, metrics: RouterMetrics
    ) -> None:
        self._config = config
        self._fleet = fleet
        self._policy = policy
        self._metrics = metrics
        self._waiting: dict[str, Sequence] = {}
        self._inflight: dict[str, Sequence] = {}
        self._num_unstarted = 0  # sequences of requests that wait for a first worker
        self._changed = asyncio.Event()  # for `run` alone
        self._fleet_changed = asyncio.Event()  # for requests that wait for a first worker
        self._idle = asyncio.Event()
        self._idle.set()
        self._loop = asyncio.get_running_loop()
        self.leaving = False  # not ready any more, but still taking requests
        self.draining = False  # taking no requests
        fleet.subscribe(self._changed.set)
        fleet.subscribe(self._fleet_changed.set)

    @property
    def num_inflight(self) -> int:
        """Sequences that run or wait for a worker."""
        return len(self._inflight)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for a worker."""
        return len(self._waiting)

    # --- a request's start ------------------------------------------------------------------------

    def admit(self, num_sequences: int) -> None:
        """Raise Overloaded or NoWorker when this router should take no more work."""
        if self.draining:
            self._metrics.rejected("draining")
            raise NoWorker("this router is shutting down", retry_after_seconds=1)
        if len(self._inflight) + num_sequences > self._config.max_inflight:
            self._metrics.rejected("inflight")
            raise Overloaded(
                f"this router has {len(self._inflight)} sequences in flight and takes at most "
                f"{self._config.max_inflight}: try again later",
                retry_after_seconds=1,
            )

    async def model_facts(self, num_sequences: int = 1) -> Welcome:
        """What the workers say about the model; waits for a first worker if there is none.

        The waiting sequences count as in flight: by them the operator sees that workers are wanted.
        Raises NoWorker after `queue_seconds`.
        """
        if self._fleet.welcome is not None:
            return self._fleet.welcome
        self._count_unstarted(num_sequences)
        try:
            return await self._first_welcome()
        finally:
            self._count_unstarted(-num_sequences)

    async def _first_welcome(self) -> Welcome:
        give_up_at = self._loop.time() + self._config.queue_seconds
        while (welcome := self._fleet.welcome) is None:
            # Waiting for an event that is set gives nobody else a turn, so it is cleared each time.
            self._fleet_changed.clear()
            try:
                async with asyncio.timeout_at(give_up_at):
                    await self._fleet_changed.wait()
            except TimeoutError:
                self._metrics.rejected("no_worker")
                raise NoWorker(
                    "no worker for this model is connected", retry_after_seconds=5
                ) from None
        return welcome

    def _count_unstarted(self, change: int) -> None:
        self._num_unstarted += change
        self._count_inflight()

    def _count_inflight(self) -> None:
        self._metrics.inflight(len(self._inflight) + self._num_unstarted)

    def start(self, sequence: Sequence) -> None:
        """Take a sequence in; its tokens or its error come through its stream."""
        self._inflight[sequence.name] = sequence
        self._idle.clear()
        self._count_inflight()
        self.place(sequence)

    # --- Placer -----------------------------------------------------------------------------------

    def place(self, sequence: Sequence) -> None:
        """Submit to the best worker that takes it, or keep it waiting."""
        if self._try_place(sequence):
            return
        if len(self._waiting) >= MAX_WAITING and not sequence.was_accepted:
            sequence.fail(self._refusal(sequence))
            return
        self._waiting[sequence.name] = sequence
        self._changed.set()

    def finished(self, sequence: Sequence) -> None:
        """Forget the sequence, and count its tokens."""
        if sequence.name not in self._inflight:
            return
        if sequence.output:
            self._metrics.sequence_done(
                sequence.slo_class,
                len(sequence.prompt),
                sequence.num_cached_tokens,
                len(sequence.output),
                sequence.gaps,
            )
        self._waiting.pop(sequence.name, None)
        self._inflight.pop(sequence.name, None)
        self._count_inflight()
        if not self._inflight:
            self._idle.set()

    def on_failover(self, stage: str) -> None:
        """Count a re-submission."""
        self._metrics.failover(stage)

    def on_first_token(self, sequence: Sequence, now: float) -> None:
        """TTFT counts from the arrival of the HTTP request."""
        self._metrics.ttft(sequence.slo_class, now - sequence.arrived_at)

    def on_gap(self, sequence: Sequence, seconds: float) -> None:
        """Every gap counts, pauses of a failover too."""
        self._metrics.tbt(sequence.slo_class, seconds)

    # --- placement --------------------------------------------------------------------------------

    def _try_place(self, sequence: Sequence) -> bool:
        now = self._loop.time()
        candidates = [
            link
            for link in self._fleet.decode_candidates(now)
            if sequence.avoid.get(link.address.name, 0.0) <= now
        ]
        if sequence.output:
            candidates = _fit_to_continue(sequence, candidates)
        placement = Placement(sequence.prompt + sequence.output, sequence.cache_salt)
        while candidates:
            link = self._policy.choose_decode(candidates, placement)
            if self._submit(sequence, link, now):
                return True
            candidates.remove(link)
        return False

    def _submit(self, sequence: Sequence, link: WorkerLink, now: float) -> bool:
        prefill = self._policy.order_prefill(self._fleet.prefill_candidates(link, now))
        if sequence.params.prompt_logprobs is not None:
            prefill = []  # they don't travel with KV: the worker computes such a prompt by itself
        peers = [
            PrefillPeer(
                peer.welcome.worker_id,
                peer.welcome.bootstrap_host or peer.address.host,
                peer.welcome.bootstrap_port,
            )
            for peer in prefill[:MAX_PREFILL_PEERS]
            if peer.welcome is not None
        ]
        try:
            link.submit(sequence.build_submit(peers, now), sequence)
        except WireError as error:
            log.debug("submit failed", worker=link.address.name, error=str(error))
            return False
        if prefill:
            num_tokens = len(sequence.prompt) + len(sequence.output)
            prefill[0].num_prompt_tokens_since_state += num_tokens
        sequence.link = link
        if not sequence.output:
            sequence.origin = link.welcome
        self._waiting.pop(sequence.name, None)
        return True

    # --- waiting ----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Place waiting sequences whenever something has changed; until cancelled."""
        while True:
            if self._waiting:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(RETRY_TICK_SECONDS):
                        await self._changed.wait()
            else:
                await self._changed.wait()
            self._changed.clear()
            now = self._loop.time()
            order = sorted(self._waiting.values(), key=lambda seq: (-seq.priority, seq.arrived_at))
            for sequence in order:
                if not self._try_place(sequence):
                    self._give_up_if_late(sequence, now)

    def _give_up_if_late(self, sequence: Sequence, now: float) -> None:
        patience = (
            self._config.failover_seconds if sequence.was_accepted else self._config.queue_seconds
        )
        too_old = now - sequence.arrived_at > self._config.request_seconds
        if too_old or now - sequence.waiting_since > patience:
            sequence.fail(self._refusal(sequence))

    def _refusal(self, sequence: Sequence) -> RouterError:
        because = f"; the last attempt: {sequence.last_trouble}" if sequence.last_trouble else ""
        if self._fleet.has_decode_worker():
            self._metrics.rejected("no_room")
            return Overloaded(
                f"every worker is full{because}",
                retry_after_seconds=max(1.0, sequence.retry_after_seconds),
            )
        self._metrics.rejected("no_worker")
        return NoWorker(f"no decode worker can serve now{because}", retry_after_seconds=5)

    # --- the end ----------------------------------------------------------------------------------

    async def drain(self, seconds: float) -> bool:
        """Take nothing new and wait until all sequences are over; False when time ran out."""
        self.draining = True
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            for sequence in list(self._inflight.values()):
                sequence.fail(NoWorker("this router is shutting down", retry_after_seconds=1))
            return False
        return True


def _fit_to_continue(sequence: Sequence, candidates: list[WorkerLink]) -> list[WorkerLink]:
    """Workers of the same model, revision and layout, whose tokens continue the answer exactly.

    When none is left (a roll-out has replaced them all), another revision with the same vocabulary
    continues. Its tokens may differ, which beats an error in the middle of an answer.
    """
    origin = sequence.origin
    assert origin is not None, "a sequence with output has had a worker"
    known = [(link, link.welcome) for link in candidates if link.welcome is not None]
    same = [link for link, told in known if told.compatibility_hash == origin.compatibility_hash]
    return same or [link for link, told in known if told.vocab_size == origin.vocab_size]
