"""One process of the model: a core, a hand-off, a loop; and what it can do next."""

from collections.abc import Callable
from dataclasses import replace
from typing import Final

from tandem_engine.config import WorkerConfig
from tandem_engine.core.engine_core import EngineCore
from tandem_engine.frames import FromCore
from tandem_engine.handoff.events import PushChunk, ToHandoff
from tandem_engine.handoff.service import HandoffService
from tandem_engine.handoff.settings import HandoffSettings
from tandem_engine.handoff.tests.protocol.fabric import Fabric, Seat
from tandem_engine.handoff.tests.protocol.loop import Clock, make_loop
from tandem_engine.handoff.tests.protocol.network import Network
from tandem_engine.mock.latency import parse_profile
from tandem_engine.mock.runner import MockRunner
from tandem_wire.handoff import TransportName
from tandem_wire.messages import PrefillPeer

PAGE: Final = 4
NUM_BLOCKS: Final = 32
MAX_LEN: Final = 40

Action = Callable[[], None]


class Service(HandoffService):
    """The real hand-off on the model's loop, whose core may fail in one more way."""

    commits_short = False
    """The next prompt that the core has computed ends a token early, as one that was aborted."""

    def post(self, event: ToHandoff) -> None:
        # Bytes tell when a whole page is missing, so the token is none that has a page to itself.
        if self.commits_short and isinstance(event, PushChunk) and event.last:
            end = event.end - 1
            if end % PAGE:
                self.commits_short = False
                event = replace(event, end=end, first_token=event.first_token ^ 1)
        super().post(event)


class Worker:
    """A process, from its start to its death."""

    def __init__(
        self,
        name: str,
        port: int,
        boot_id: str,
        clock: Clock,
        network: Network,
        fabric: Fabric,
        transport: TransportName | None,
        send: Callable[["Worker", FromCore], None],
        shape: str,
    ) -> None:
        self.name = name
        self.boot_id = boot_id
        self.peer = PrefillPeer(name, "host", port)
        self.clock = clock
        self.is_frozen = False  # stopped, as by SIGSTOP
        self.loop = make_loop(clock, network)
        self.seat = fabric.seats[boot_id] = Seat()
        config = WorkerConfig(
            model=f"mock://tiny?blocks={NUM_BLOCKS}&max_len={MAX_LEN}&{shape}",
            page_size=PAGE,
            chunk_tokens=2 * PAGE,
            max_batched_tokens=16,
            max_running=6,
            max_waiting=8,
            local_prefill_tokens=PAGE,
            lease_seconds=5.0,
        ).resolve_auto({"POD_NAME": name})
        runner = MockRunner(
            parse_profile(config.mock_profile), page_size=PAGE, sleep=lambda _: None
        )
        settings = HandoffSettings(
            worker_id=name,
            boot_id=boot_id,
            bootstrap_port=port,
            transport=transport or "auto",
            heartbeat_seconds=2.0,
            lease_seconds=5.0,
            stall_seconds=4.0,
            dial_seconds=2.0,
            blacklist_seconds=1.0,
            fault_window_seconds=6.0,
            out_of_use_seconds=1.0,
            max_out_of_use_seconds=4.0,
            write_bytes=runner.kv.layout.block_bytes,
        )
        self.service = Service(settings, runner.kv, "hash", self.loop)
        self.core = EngineCore(config, runner, self.service, lambda frame: send(self, frame), clock)
        self._rested_at = -1.0
        self.loop.create_task(self.service.serve())

    # --- what it can do next ----------------------------------------------------------------------

    def actions(self, holds: set[str], *, by_turns: bool = False) -> list[Action]:
        """Everything that one of its threads could do now; with `by_turns`, the loop's in bulk."""
        if self.is_frozen:
            return []
        found: list[Action] = []
        if self.loop.has_work:
            found.append(self.loop.run_turn)
            if not by_turns:
                found.append(self.loop.run_one)
        if self._core_has_work:
            found.append(self.run_core)
        return found + self.thread_actions(holds)

    def thread_actions(self, holds: set[str]) -> list[Action]:
        """What the transports' threads could do now."""
        found: list[Action] = []
        for thread in self.seat.threads:
            hold = "arrivals" if thread.current is None else "landings"
            if thread.can_step and hold not in holds:
                found.append(thread.step)
        if "lanes" not in holds:
            found += [lane.step for lane in self.seat.lanes if lane.can_step]
        return found

    @property
    def _core_has_work(self) -> bool:
        if self.core._inbox or self.service._outbox:
            return True
        return self._rested_at != self.clock.now

    def run_core(self) -> None:
        """One round of the core's loop."""
        self._rested_at = self.clock.now
        if self.core.run_once():
            self._rested_at = -1.0

    # --- what is left -----------------------------------------------------------------------------

    def leases(self) -> dict[str, int]:
        """What the hand-off and the core hold for others or with others, by its kind."""
        service = self.service
        decode, prefill = service._decode, service._prefill
        sessions = list(prefill._sessions.values())
        peers = [peer.session for peer in decode._peers._peers.values()]
        asked = [session for session in peers if session is not None]
        transfers = self.core.scheduler.transfers
        return {
            "leases": service.num_leases(),
            "fetches": len(decode._fetches) + transfers.num_fetching,
            "abandoned requests": len(transfers._abandoned),
            "pushes": sum(len(each.pushes) + len(each._tasks) for each in sessions)
            + transfers.num_pushing,
            "fences under way": sum(len(each._chores) for each in sessions),
            "writes": sum(len(each.outbound._jobs) for each in sessions),
            "attempts": sum(len(each.attempts) for each in asked),
            "landings": sum(len(each.inbound._landings) for each in asked),
            "requests": len(list(self.core.scheduler.requests)),
            "used blocks": self.core.ledger.num_used,
        }
