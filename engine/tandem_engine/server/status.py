"""What the server knows about its worker: ports, loading, mode, last report of the core."""

import asyncio
from collections.abc import Callable

import msgspec

from tandem_engine.config import WorkerConfig
from tandem_engine.doctor.check import Check
from tandem_engine.fabric.environment import NO_FABRIC, FabricChoice
from tandem_engine.frames import CoreLoading, CoreReady, CoreStats
from tandem_wire.messages import Welcome, WorkerState


class WorkerStatus:
    """Filled by the core's frames; read by routers' connections and HTTP."""

    def __init__(self, config: WorkerConfig, fabric: FabricChoice = NO_FABRIC) -> None:
        self.config = config
        self.fabric = fabric
        self.ports: dict[str, int] = {}
        self.checks: list[Check] = []  # what is not well on this machine
        self.core_pid = 0  # until there is a core
        self.ready: CoreReady | None = None
        self.loading = CoreLoading("starting", 0.0)
        self.stats: CoreStats | None = None
        self.num_reports = 0
        self.error = ""
        self.stopping = False
        self._changed = asyncio.Condition()

    @property
    def state(self) -> WorkerState:
        """The newest state, with this side's knowledge of a drain."""
        state = self.stats.state if self.stats is not None else WorkerState(role=self.config.role)
        if self.stopping and not state.draining:
            return msgspec.structs.replace(state, draining=True)
        return state

    def not_ready(self) -> str:
        """Why new work should go elsewhere; empty if it may come here."""
        if self.error:
            return self.error
        if self.ready is None:
            return f"loading: {self.loading.stage} ({self.loading.fraction:.0%})"
        return "draining" if self.state.draining else ""

    def is_idle(self) -> bool:
        """Whether a drain is complete: no request, no lease."""
        state = self.state
        busy = state.num_running + state.num_waiting + state.num_leases
        return state.draining and busy == 0

    async def changed(self) -> None:
        """Wake up everyone who waits in `wait_for`."""
        async with self._changed:
            self._changed.notify_all()

    async def wait_for(self, condition: Callable[[], bool], timeout_seconds: float) -> bool:
        """Wait until `condition()` holds after a report of the core; False if it didn't in time."""
        try:
            async with asyncio.timeout(timeout_seconds), self._changed:
                await self._changed.wait_for(condition)
        except TimeoutError:
            return False
        return True

    def welcome(self) -> Welcome:
        """The answer to a router's `Hello`; only when the core is ready."""
        ready, config = self.ready, self.config
        assert ready is not None
        return Welcome(
            worker_id=config.worker_id,
            boot_id=config.boot_id,
            role=self.state.role,
            model=config.served_model_name,
            compatibility_hash=ready.compatibility_hash,
            max_model_len=ready.max_model_len,
            page_size=ready.page_size,
            num_blocks=ready.num_blocks,
            vocab_size=ready.vocab_size,
            eos_token_ids=ready.eos_token_ids,
            bootstrap_host=config.publish_host,
            bootstrap_port=ready.bootstrap_port,
            salt_parts=ready.salt_parts,
        )
