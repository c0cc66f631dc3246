"""The rules that hypothesis plays: requests, faults, drains, role changes, steps in any order."""

import itertools
import sys
from collections import Counter
from typing import Any, ClassVar, Final

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from tandem_engine.frames import SetMode
from tandem_engine.handoff.tests.protocol.world import HOLDS, NAMES, World, deterministic

PREFIXES: Final = [[40 + (i * k) % 50 for i in range(28)] for k in range(1, 8)]
ROUTES: Final = [
    (names[0], [*names[1:count], *names[1:again]])
    for names in itertools.permutations(NAMES)
    for count, again in ((3, 1), (2, 2), (2, 2))
]
"""Decode workers with the prefill workers that they may ask; some twice."""

workers = st.sampled_from(NAMES)
choices = st.integers(0, 255)
requests = st.fixed_dictionaries(
    {
        "route": st.sampled_from(ROUTES),
        "prefix": st.integers(0, len(PREFIXES) - 1),
        "length": st.integers(9, 26),
        "tail": st.integers(0, 3),
        "max_tokens": st.integers(1, 6),
    }
)
failures = st.sampled_from([None, None, ValueError("bad status"), OSError("link down")])
modes = st.one_of(
    st.builds(SetMode, draining=st.booleans(), move_streams=st.booleans()),
    st.builds(SetMode, role=st.sampled_from(["prefill", "decode", "both"])),
)


class ProtocolMachine(RuleBasedStateMachine):
    """One world. `num_steps` and `counts` say what all worlds together came to."""

    num_steps: ClassVar[int] = 0
    counts: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self._patch = deterministic()
        self._patch.__enter__()
        self.world: World

    @initialize(
        transport=st.sampled_from(["mooncake", "tcp", "mooncake", "tcp", None]), meets=st.booleans()
    )
    def begin(self, transport: Any, meets: bool) -> None:
        # Over sockets only the window of every second layer travels.
        shape = "layers=2&window=6" if transport == "tcp" else "layers=1"
        self.world = World(transport, shape)
        if meets:
            self.world.meet()

    # --- requests, drains, roles ------------------------------------------------------------------

    @rule(requests=st.lists(requests, min_size=1, max_size=2))
    def ask(self, requests: list[dict[str, Any]]) -> None:
        for each in requests:
            worker, peers = each["route"]
            tail = each["tail"]
            prompt = PREFIXES[each["prefix"]][: each["length"] - tail] + [32 + tail] * tail
            self.world.router.ask(prompt, each["max_tokens"], worker, peers)

    @precondition(lambda self: self.world.router.open_chats())
    @rule(choice=choices)
    def cancel(self, choice: int) -> None:
        """A client leaves; with an odd choice all of them do."""
        chats = self.world.router.open_chats()
        for chat in chats if choice % 2 else [chats[choice // 2 % len(chats)]]:
            self.world.router.cancel(chat)

    @rule(worker=workers, mode=modes)
    def set_mode(self, worker: str, mode: SetMode) -> None:
        if worker in self.world.workers:
            self.world.workers[worker].core.post(mode)

    # --- what happens by itself -------------------------------------------------------------------

    @rule(order=st.binary(min_size=10, max_size=60), only=st.sampled_from([*NAMES, *[""] * 6]))
    def run(self, order: bytes, only: str) -> None:
        """Things happen in this order; with `only`, one worker alone is awake."""
        only = only if only in self.world.workers else ""
        for choice in order:
            if not self.world.step(choice, only):
                break

    @rule(seconds=st.integers(0, 10))
    def pass_time(self, seconds: int) -> None:
        self.world.pass_time(seconds)

    @rule()
    def calm_down(self) -> None:
        """What stood still moves again, and who was dead is started."""
        self.world.heal()
        for name in NAMES:
            if name not in self.world.workers:
                self.world.start(name)

    @rule(
        request=requests,
        orders=st.tuples(*[st.binary(max_size=40)] * 3),
        holds=st.lists(st.sampled_from(HOLDS), min_size=1, max_size=2),
        failure=failures,
        waits=st.tuples(*[st.sampled_from([0, 0, 5, 10])] * 2),
        leaves=st.booleans(),
    )
    def give_up(
        self,
        request: dict[str, Any],
        orders: tuple[bytes, bytes, bytes],
        holds: list[str],
        failure: Exception | None,
        waits: tuple[int, int],
        leaves: bool,
    ) -> None:
        """A hand-off is under way when its writes stand still; in the end they go on."""
        self.ask([request])
        self.run(orders[0], "")
        self.disturb_writes(holds, failure, False)
        self.run(orders[1], "")
        self.world.pass_time(waits[0])
        if leaves:
            self.world.router.cancel(self.world.router.chats[-1])
        self.run(orders[2], "")
        self.world.pass_time(waits[1])
        self.disturb_writes([], None, False)

    # --- faults -----------------------------------------------------------------------------------

    @rule(
        holds=st.lists(st.sampled_from(HOLDS), max_size=2),
        failure=failures,
        flips=st.booleans(),
    )
    def disturb_writes(self, holds: list[str], failure: Exception | None, flips: bool) -> None:
        """From now on these stand still, and none else; the next write fails or changes."""
        self.world.holds = set(holds)
        self.world.fabric.failing = failure
        self.world.fabric.flips_next = flips and failure is None

    @rule(
        what=st.sampled_from(["cut", "hold", "lose", "die", "freeze", "commit short", "jump"]),
        choice=choices,
    )
    def disturb(self, what: str, choice: int) -> None:
        """Something else goes wrong, with a worker or with a connection."""
        world = self.world
        name = sorted(world.workers)[choice % len(world.workers)]
        pipes = world.network.pipes()
        if what == "jump":  # time passes while nothing moves
            world.clock.now += choice / 50
        elif what == "die":
            if len(world.workers) > 1:
                world.kill(name)
        elif what == "freeze":
            world.workers[name].is_frozen = True
        elif what == "commit short":
            for worker in world.workers.values():
                worker.service.commits_short = True
        elif pipes:
            pipe = pipes[choice % len(pipes)]
            if what == "cut":
                world.network.cut(pipe.receiver)
            elif what == "lose":
                pipe.is_dead = True
                pipe.chunks.clear()
            else:
                pipe.is_held = True

    def teardown(self) -> None:
        try:
            # A rule that has failed, or was given up, leaves nothing to check.
            if hasattr(self, "world") and sys.exc_info()[0] is None:
                self.world.end()
                cls = ProtocolMachine
                cls.num_steps += self.world.num_steps
                cls.counts.update(self.world.counts())
        finally:
            if hasattr(self, "world"):
                self.world.dispose()
            self._patch.__exit__(None, None, None)
