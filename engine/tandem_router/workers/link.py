"""The router's connection to one worker: dial, greet, heartbeat, fan out steps, dial again."""

import asyncio
import contextlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

import msgspec
import structlog

from tandem_router.workers.breaker import CircuitBreaker
from tandem_router.workers.prefix_index import PrefixIndex
from tandem_wire.connection import Connection
from tandem_wire.endpoint import dial, keep_alive
from tandem_wire.errors import WireError
from tandem_wire.messages import (
    PROTOCOL,
    Cancel,
    Hello,
    KvEvents,
    Ping,
    Pong,
    Refused,
    Step,
    StepItem,
    Submit,
    Welcome,
    WorkerMessage,
    WorkerState,
)

FIRST_BACKOFF_SECONDS: Final = 0.05
MAX_BACKOFF_SECONDS: Final = 1.0
WELCOME_SECONDS: Final = 5.0
CLOSED_HERE: Final = "this router closed the connection"

log = structlog.get_logger(__name__)


class Attempt(Protocol):
    """What runs on a worker. The connection's reader calls it back, so it must not block."""

    def on_item(self, item: StepItem, now: float) -> None:
        """New tokens or the end; after an item with `finish` nothing more comes."""

    def on_refused(self, refused: Refused, now: float) -> None:
        """The worker will not run it; nothing more comes."""

    def on_lost(self, reason: str, now: float) -> None:
        """The connection is gone and with it the request; nothing more comes."""


@dataclass(frozen=True)
class WorkerAddress:
    """Where a worker listens and what its pod says about it. `name` is unique in the fleet."""

    name: str
    host: str
    port: int
    incarnation: str = ""  # pod UID: a new pod with an old name is another worker
    marked_draining: bool = False


class WorkerLink:
    """One worker as this router sees it.

    The link owns the connection and the table of attempts that run on it. `on_change` is called
    whenever something that matters for placement has changed.
    """

    def __init__(
        self,
        address: WorkerAddress,
        *,
        router_id: str,
        model_name: str,
        heartbeat_seconds: float,
        on_change: Callable[[], None],
    ) -> None:
        self.address = address
        self.welcome: Welcome | None = None
        self.state: WorkerState | None = None
        self.breaker = CircuitBreaker()
        self.prefixes = PrefixIndex()
        self.running: dict[str, Attempt] = {}
        self.leaving = False  # discovery no longer lists it; running streams finish
        self.trouble = "not connected yet"  # why it can't be used; empty when it can
        self.was_dialled = False  # a first attempt to connect has succeeded or failed
        self.pong_at = 0.0
        self.num_submitted_since_state = 0
        self.num_prompt_tokens_since_state = 0
        self._router_id = router_id
        self._model_name = model_name
        self._heartbeat_seconds = heartbeat_seconds
        self._on_change = on_change
        self._connection: Connection[WorkerMessage] | None = None
        self._decoder: msgspec.msgpack.Decoder[WorkerMessage] = msgspec.msgpack.Decoder(
            WorkerMessage
        )
        self._loop = asyncio.get_running_loop()
        self._ping = 0
        self._redial = asyncio.Event()

    # --- what placement asks ----------------------------------------------------------------------

    @property
    def worker_id(self) -> str:
        """The worker's own name for itself, once it has said it."""
        return self.welcome.worker_id if self.welcome is not None else self.address.name

    @property
    def is_connected(self) -> bool:
        """True once the worker has welcomed this router, until the connection ends."""
        return self._connection is not None and not self.trouble

    @property
    def is_draining(self) -> bool:
        """The worker said so, its pod is marked, or it left the fleet."""
        return (
            self.leaving
            or self.address.marked_draining
            or (self.state is not None and self.state.draining)
        )

    @property
    def role(self) -> str:
        """The role the worker has now; empty while unknown."""
        if self.state is not None:
            return self.state.role
        return self.welcome.role if self.welcome is not None else ""

    @property
    def num_load(self) -> int:
        """Sequences that run or wait there, with those sent since the worker's last report."""
        reported = 0
        if self.state is not None:
            reported = self.state.num_running + self.state.num_waiting
        return max(len(self.running), reported + self.num_submitted_since_state)

    def can_take(self, now: float) -> bool:
        """Connected, not draining, and the circuit is closed or due for a trial."""
        return self.is_connected and not self.is_draining and self.breaker.allows(now, self.pong_at)

    # --- requests ---------------------------------------------------------------------------------

    def submit(self, message: Submit, attempt: Attempt) -> None:
        """Send a request. Raises WireError when the connection has just ended."""
        assert self._connection is not None, "placement only chooses connected workers"
        self._connection.send(message)
        self.running[message.rid] = attempt
        self.breaker.on_submit()
        self.num_submitted_since_state += 1
        if not message.prefill:
            self.num_prompt_tokens_since_state += len(message.tokens)

    def cancel(self, rid: str) -> None:
        """Forget an attempt and tell the worker; its later items are dropped."""
        if self.running.pop(rid, None) is None or self._connection is None:
            return
        self.breaker.on_abandoned()
        with contextlib.suppress(WireError):  # a dead connection has cancelled it already
            self._connection.send(Cancel(rid))

    # --- the connection's life --------------------------------------------------------------------

    def redial_now(self) -> None:
        """Skip the rest of a back-off: the pod has just changed."""
        self._redial.set()

    async def run(self) -> None:
        """Keep a connection until cancelled."""
        backoff = FIRST_BACKOFF_SECONDS
        while True:
            try:
                if await self._serve_once():
                    backoff = FIRST_BACKOFF_SECONDS
            except WireError as error:
                self._lose(str(error))
            except asyncio.CancelledError:
                self._lose(CLOSED_HERE)
                raise
            self._redial.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(backoff * random.uniform(0.5, 1.0)):
                    await self._redial.wait()
            backoff = min(2 * backoff, MAX_BACKOFF_SECONDS)

    async def _serve_once(self) -> bool:
        """One connection from dial to its end; True when the worker had welcomed us."""
        connection = await dial(self.address.host, self.address.port, self._decoder)
        beats: asyncio.Task[None] | None = None
        try:
            connection.send(Hello(self._router_id))
            async with asyncio.timeout(WELCOME_SECONDS):
                first = await connection.receive()
            if not self._greet(connection, first):
                return False
            beats = asyncio.create_task(
                keep_alive(connection, self._next_ping, self._heartbeat_seconds)
            )
            while messages := await connection.receive_many():
                self._handle(messages)
            self._lose("the worker closed the connection")
            return True
        except TimeoutError:
            self._lose(f"no welcome within {WELCOME_SECONDS:g} s")
            return False
        finally:
            if beats is not None:
                beats.cancel()
            connection.abort()

    def _greet(self, connection: Connection[WorkerMessage], first: WorkerMessage) -> bool:
        if isinstance(first, Refused):
            self._lose(f"refused ({first.code}): {first.message}")
            return False
        if not isinstance(first, Welcome):
            self._lose(f"greeted with {type(first).__name__} instead of Welcome")
            return False
        if first.protocol != PROTOCOL:
            self._lose(f"speaks protocol {first.protocol}, this router speaks {PROTOCOL}")
            return False
        if self.address.incarnation and first.worker_id != self.address.name:
            # On a node's network, the port of a worker that ended may belong to another by now.
            self._lose(f"another worker answers at its address: {first.worker_id}")
            return False
        if first.model != self._model_name:
            self._lose(f"serves model {first.model!r}, this router serves {self._model_name!r}")
            return False
        if self.welcome is None or self.welcome.boot_id != first.boot_id:
            self.prefixes.clear()
            self.breaker = CircuitBreaker()
        self.welcome = first
        self.state = None
        self.trouble = ""
        self.was_dialled = True
        self.pong_at = self._loop.time()
        self._connection = connection
        log.info("worker connected", worker=first.worker_id, role=first.role)
        self._on_change()
        return True

    def _next_ping(self) -> Ping:
        self._ping += 1
        return Ping(self._ping)

    def _handle(self, messages: list[WorkerMessage]) -> None:
        now = self._loop.time()
        running = self.running
        changed = False
        for message in messages:
            if type(message) is Step:
                self.breaker.on_success()
                for item in message.items:
                    attempt = running.get(item.rid)
                    if attempt is None:
                        continue  # cancelled here while it was under way
                    if item.finish:
                        del running[item.rid]
                        changed = True
                    attempt.on_item(item, now)
            elif isinstance(message, WorkerState):
                self.state = message
                self.num_submitted_since_state = 0
                self.num_prompt_tokens_since_state = 0
                changed = True
            elif isinstance(message, Refused):
                attempt = running.pop(message.rid, None)
                if attempt is not None:
                    attempt.on_refused(message, now)
            elif isinstance(message, KvEvents):
                self.prefixes.apply(message)
            elif isinstance(message, Pong):
                self.pong_at = now
        if changed:
            self._on_change()

    def _lose(self, reason: str) -> None:
        was_connected = self._connection is not None
        if was_connected and reason is not CLOSED_HERE:
            log.warning("worker lost", worker=self.address.name, reason=reason)
        elif not was_connected and self.trouble != reason:
            log.info("worker not usable yet", worker=self.address.name, reason=reason)
        self.trouble = reason
        self.was_dialled = True
        self._connection = None
        self.state = None
        self.prefixes.clear()
        self.num_submitted_since_state = 0
        self.num_prompt_tokens_since_state = 0
        lost, self.running = self.running, {}
        now = self._loop.time()
        for attempt in lost.values():
            attempt.on_lost(reason, now)
        if was_connected:
            self._on_change()
