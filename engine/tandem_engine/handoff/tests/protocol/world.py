"""Workers, a router and what is between them; what can happen next, and what can go wrong."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Final
from unittest import mock

from tandem_engine.frames import FromCore, ProbeRequest
from tandem_engine.handoff.service import HandoffService
from tandem_engine.handoff.tests.protocol import checks
from tandem_engine.handoff.tests.protocol.fabric import Arrival, Fabric, ModelTransport
from tandem_engine.handoff.tests.protocol.loop import Clock, ModelLoop, restart_numbers
from tandem_engine.handoff.tests.protocol.network import Network
from tandem_engine.handoff.tests.protocol.one_sided import OneSidedTransport
from tandem_engine.handoff.tests.protocol.router import ProtocolViolation, Router, require
from tandem_engine.handoff.tests.protocol.staged import StagedTransport
from tandem_engine.handoff.tests.protocol.worker import Action, Worker
from tandem_engine.handoff.transports import registry
from tandem_engine.handoff.transports.base import _Job
from tandem_wire.connection import Connection
from tandem_wire.handoff import TransportName

NAMES: Final = ("a", "b", "c")
HOLDS: Final = ("network", "arrivals", "landings", "lanes")
"""What of the transports may stand still: writes that P has posted, those that D has not begun to
take, those that it has, and P's threads."""
TICK: Final = 1.0
PATIENCE: Final = 60.0
"""Once nothing goes wrong any more, every request ends within so many seconds of model time."""
MANY_STEPS: Final = 20_000
"""More than any run to rest takes: beyond it something goes round in circles."""


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """The registry knows the model's transports alone, and sets have an order that repeats."""
    restart_numbers()
    with (
        mock.patch.object(registry, "BUILT", (OneSidedTransport, StagedTransport)),
        mock.patch.object(_Job, "__hash__", lambda job: hash(job.future)),
        mock.patch.object(Connection, "__hash__", lambda connection: hash(connection._closed)),
    ):
        yield


class World:
    """All that exists. `step` lets one thing happen and checks what must always hold."""

    def __init__(self, transport: TransportName | None = None, shape: str = "layers=1") -> None:
        self.clock = Clock()
        self.network = Network()
        self.fabric = Fabric()
        self.fabric.on_landing = self._check_landing
        ModelTransport.fabric = self.fabric
        self.router = Router()
        self.transport = transport
        self.shape = shape  # of the mock's KV
        self.num_steps = 0
        self.holds: set[str] = set()
        self._num_boots = 0
        self._services: list[HandoffService] = []
        self._loops: list[ModelLoop] = []
        for name in NAMES:
            self.start(name)

    @property
    def workers(self) -> dict[str, Worker]:
        """The processes that live, by name."""
        return self.router.living

    def start(self, name: str) -> None:
        """Start a process at the address that its predecessor, if any, had."""
        self._num_boots += 1
        boot_id = f"{name}{self._num_boots}"
        port = 1 + NAMES.index(name)
        self.workers[name] = Worker(
            name,
            port,
            boot_id,
            self.clock,
            self.network,
            self.fabric,
            self.transport,
            self._take_frame,
            self.shape,
        )
        self._services.append(self.workers[name].service)
        self._loops.append(self.workers[name].loop)
        # Ready means that the port is open.
        while self.workers[name].service.bootstrap_port == 0:
            self.workers[name].loop.run_one()

    def meet(self) -> None:
        """Let every worker open a session with every other, by a probe of one block."""
        for worker in self.workers.values():
            for number, other in enumerate(self.workers.values()):
                if other is not worker:
                    host, port = other.peer.host, other.peer.port
                    probe = ProbeRequest(number=number, host=host, port=port, num_blocks=1)
                    worker.core.post(probe)
        self.rest()

    def counts(self) -> Counter[str]:
        """What has happened: ends of requests, and the hand-offs' own counters."""
        found = Counter(self.router.num_ends)
        for service in self._services:
            for name, total in service.counters().items():
                if not name.startswith(("kv_transfer_seconds", "kv_transfer_bytes")):
                    found[name] += int(total)
        return found

    def _take_frame(self, worker: Worker, frame: FromCore) -> None:
        if self.workers.get(worker.name) is worker:
            self.router.take(worker, frame)

    # --- steps ------------------------------------------------------------------------------------

    def actions(self, only: str = "", *, by_turns: bool = False) -> list[Action]:
        """Everything that could happen next without time passing or anything going wrong.

        With `only`, by this worker alone.
        """
        if only:
            return self.workers[only].actions(self.holds)
        found: list[Action] = []
        for worker in self.workers.values():
            found += worker.actions(self.holds, by_turns=by_turns)
        network, fabric = self.network, self.fabric
        if network.dials:
            found.append(network.answer_dial)
        found += [pipe.deliver for pipe in network.pipes() if pipe.can_deliver]
        if "network" not in self.holds:
            found += [partial(post.land, post) for post in fabric.posted]
        return found

    def step(self, choice: int, only: str = "", *, by_turns: bool = False) -> bool:
        """Let one thing happen; False when nothing can."""
        actions = self.actions(only, by_turns=by_turns)
        if not actions:
            return False
        actions[choice % len(actions)]()
        self.check()
        return True

    def check(self) -> None:
        """What must hold after every step."""
        self.num_steps += 1
        by_inbound = {}
        for worker in self.workers.values():
            checks.check_ledger(worker)
            checks.check_loop(worker)
            checks.check_sources(worker)
            for thread in worker.seat.threads:
                arrival = thread.current
                if arrival is not None and arrival.touches_cache:
                    checks.check_target(worker, arrival)
            by_inbound[id(worker.seat)] = worker
        for post in self.fabric.posted:
            inbound = post.arrival.inbound
            target = by_inbound.get(id(inbound.seat))
            if target is not None and not inbound.is_closed and post.arrival.touches_cache:
                checks.check_target(target, post.arrival)

    def _check_landing(self, arrival: Arrival) -> None:
        for worker in self.workers.values():
            if worker.seat is arrival.inbound.seat and arrival.touches_cache:
                checks.check_target(worker, arrival)

    def rest(self) -> None:
        """Let everything happen that can, in turn, without time passing."""
        for number in range(MANY_STEPS):
            if not self.step(number, by_turns=True):
                break
        else:
            raise ProtocolViolation(f"no rest after {MANY_STEPS} steps")
        self.network.forget_ended()
        for worker in self.workers.values():
            if not self.is_disturbed:
                checks.check_at_rest(worker)

    @property
    def is_disturbed(self) -> bool:
        """Whether something is held back, so that `rest` is not the end of what can happen."""
        frozen = any(worker.is_frozen for worker in self.workers.values())
        held = any(pipe.is_held for pipe in self.network.pipes())
        return frozen or held or bool(self.holds)

    def pass_time(self, seconds: float) -> None:
        """Let time pass while everything else happens at once."""
        end = self.clock.now + seconds
        while self.clock.now < end:
            self.rest()
            self.clock.now += TICK
        self.rest()

    # --- what goes wrong --------------------------------------------------------------------------

    def kill(self, name: str) -> None:
        """A process dies: the kernel closes its connections, and its memory is gone."""
        worker = self.workers.pop(name)
        self.network.leave(worker.loop)
        for post in list(self.fabric.posted):
            if post.arrival.inbound.seat is worker.seat:
                self.fabric.posted.remove(post)
                post.is_done, post.failure = True, OSError("the peer is gone")
        self._bury(worker)
        self.router.lost(worker)

    def _bury(self, worker: Worker) -> None:
        """Let the objects of a process that no one sees any more come to their end."""
        worker.is_frozen = False
        worker.loop.clock = worker.clock = Clock(self.clock.now)
        worker.service.stop()
        for number in range(MANY_STEPS):
            if not worker.loop.open_tasks():
                return
            actions: list[Action] = [worker.loop.run_turn] if worker.loop.has_work else []
            actions += worker.thread_actions(set())
            actions += [
                pipe.deliver
                for pipe in self.network.pipes()
                if pipe.can_deliver and pipe.receiver.loop is worker.loop
            ]
            if actions:
                actions[number % len(actions)]()
            else:
                timer = worker.loop.next_timer
                require(timer is not None, f"{worker.boot_id} can't end: it waits for nothing")
                assert timer is not None
                worker.loop.clock.now = timer
        raise ProtocolViolation(f"{worker.boot_id} does not end")

    def heal(self) -> None:
        """Nothing goes wrong from now on."""
        self.holds.clear()
        self.fabric.failing, self.fabric.flips_next = None, False
        for pipe in self.network.pipes():
            pipe.is_held = False
        for worker in self.workers.values():
            worker.is_frozen = False
            worker.service.commits_short = False

    # --- the end ----------------------------------------------------------------------------------

    def settle(self) -> None:
        """Heal, and let time pass until every request has had its end; nothing may be left."""
        self.heal()
        end = self.clock.now + PATIENCE
        while True:
            self.rest()
            if not self.router.open_chats() and not any(
                any(worker.leases().values()) for worker in self.workers.values()
            ):
                break
            if self.clock.now > end:
                stuck = [chat.rid for chat in self.router.open_chats()]
                for worker in self.workers.values():
                    checks.check_nothing_left(worker)
                raise ProtocolViolation(f"requests without an end: {stuck}")
            self.clock.now += TICK
        for worker in self.workers.values():
            checks.check_nothing_left(worker)
        require(not self.fabric.posted, "writes are under way")

    def end(self) -> None:
        """Settle, stop every process in turn; no task may be left."""
        self.settle()
        for name in list(self.workers):
            worker = self.workers[name]
            worker.service.stop()
            for _ in range(int(PATIENCE / TICK)):
                self.pass_time(TICK)
                if not worker.loop.open_tasks():
                    break
            left = worker.loop.open_tasks()
            require(not left, f"{worker.boot_id} has ended, but not {left}")
            del self.workers[name]
            self.network.leave(worker.loop)

    def dispose(self) -> None:
        """Leave the world, however it stands, with nothing of it that could still run."""
        for loop in self._loops:
            loop.dispose()
