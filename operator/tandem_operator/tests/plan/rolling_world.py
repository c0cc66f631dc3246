"""A world of numbers in which roll-outs run to their end: workers start, fail, drain and die."""

from dataclasses import dataclass, field
from heapq import heappop, heappush
from random import Random

from tandem_operator.pair import Pair, Role
from tandem_operator.plan.rollout.counts import Counts, Goal, Workers, available
from tandem_operator.plan.rollout.rolling import needed, plan_rolling

PENDING, READY, DRAINING, FAILED = "pending", "ready", "draining", "failed"


@dataclass(eq=False)
class Worker:
    """One worker, with the time of what happens to it next."""

    revision: str
    role: Role
    state: str = PENDING
    placed: bool = False
    created: int = 0


@dataclass
class World:
    """The workers of one service on `gpus` devices (None: as many as anybody asks for).

    Workers of the revisions in `bad` fail instead of becoming ready.
    """

    random: Random
    desired: Pair[int]
    surge: Pair[int]
    unavailable: Pair[int]
    target: str = "a"
    serving: str = ""
    gpus: int | None = None
    bad: set[str] = field(default_factory=set)
    paused: bool = False
    workers: list[Worker] = field(default_factory=list)
    now: int = 0
    queue: list[tuple[int, int, Worker]] = field(default_factory=list)
    num_queued: int = 0
    num_steps: int = 0

    @property
    def goal(self) -> Goal:
        """What the planner is told."""
        fallback = self.serving if self.serving != self.target else ""
        return Goal(self.target, self.desired, self.surge, self.unavailable, fallback, self.paused)

    def count(self) -> Counts:
        """The workers as numbers."""
        found: dict[str, dict[Role, list[Worker]]] = {}
        for worker in self.workers:
            if worker.revision not in found:
                found[worker.revision] = {Role.PREFILL: [], Role.DECODE: []}
            found[worker.revision][worker.role].append(worker)
        return Counts(
            {
                name: Pair(_count(roles[Role.PREFILL]), _count(roles[Role.DECODE]))
                for name, roles in found.items()
            }
        )

    def act(self) -> bool:
        """One pass of the operator; the bounds are checked. Whether anything was changed."""
        self.num_steps += 1
        seen, goal = self.count(), self.goal
        step = plan_rolling(seen, goal)
        changes = {
            (name, role): change
            for name in {*seen.of, *step.live}
            for role in (Role.PREFILL, Role.DECODE)
            if (change := step.of(name).of(role) - seen.get(name).of(role).live)
        }
        for (name, role), change in changes.items():
            self._follow(name, role, change)
        if changes:
            self._check(seen, self.count(), goal)
        self._place()
        self._note_serving()
        return bool(changes)

    def _check(self, seen: Counts, after: Counts, goal: Goal) -> None:
        """A step neither goes above the cap nor takes what is available below the floor."""
        before, left = available(seen, needed(goal)), available(after, needed(goal))
        for role in Role:
            most = max(goal.cap.of(role), seen.total(role))
            assert after.total(role) <= most, f"above the cap: {seen} for {goal}"
            least = min(before.of(role), goal.floor.of(role))
            assert left.of(role) >= least, f"below the floor: {seen} for {goal}"

    def _follow(self, name: str, role: Role, change: int) -> None:
        mine = [w for w in self.workers if (w.revision, w.role) == (name, role)]
        if change < 0:
            order = sorted((w for w in mine if w.state in (PENDING, READY)), key=lambda w: w.state)
            for worker in order[:-change]:
                worker.state = DRAINING
                self._later(worker)
        for worker in [w for w in mine if w.state == DRAINING and w.placed][: max(change, 0)]:
            worker.state = PENDING
            self._later(worker)
            change -= 1
        # The replacements of failed workers wait until their back-off is over.
        for _ in range(change - sum(w.state == FAILED for w in mine)):
            self.workers.append(Worker(name, role, created=self.now))

    def _place(self) -> None:
        placed = sum(worker.placed and worker.state != FAILED for worker in self.workers)
        for worker in self.workers:
            if not worker.placed and worker.state == PENDING:
                if self.gpus is not None and placed >= self.gpus:
                    return
                worker.placed = True
                placed += 1
                self._later(worker)

    def _later(self, worker: Worker) -> None:
        self.num_queued += 1
        at = self.now + self.random.randint(1, 4)
        heappush(self.queue, (at, self.num_queued, worker))

    def _note_serving(self) -> None:
        if self.is_done:
            self.serving = self.target

    def wait(self) -> bool:
        """Go on to the next time at which something happens. False if nothing will."""
        due: list[Worker] = []
        while self.queue and (not due or self.queue[0][0] == self.now):
            self.now, _, worker = heappop(self.queue)
            if worker in self.workers and worker not in due:
                due.append(worker)
        for worker in due:
            if worker.state == PENDING:
                worker.state = FAILED if worker.revision in self.bad else READY
                if worker.state == FAILED:
                    self._later(worker)
            elif worker.state in (DRAINING, FAILED):
                self.workers.remove(worker)
        self._place()
        return bool(due)

    def die(self, number: int) -> None:
        """One of the workers is gone."""
        if self.workers:
            self.workers.remove(self.workers[number % len(self.workers)])
            self._place()

    def pass_by(self, passes: int) -> None:
        """Some passes, with the next event after each of them."""
        for _ in range(passes):
            self.act()
            if not self.random.randrange(4):
                self.act()  # a pass may come at any time
            self.wait()

    def finish(self, limit: int = 2000) -> None:
        """Pass after pass until nothing changes any more; the roll-out must be at its end then."""
        for _ in range(limit):
            changed = self.act()
            if not self.random.randrange(4):
                changed |= self.act()
            if not self.wait() and not changed:
                assert self.is_done, f"it is stuck: {self.count()} for {self.goal}"
                return
        raise AssertionError(f"it never ends: {self.count()} for {self.goal}")

    @property
    def is_done(self) -> bool:
        """Whether the target has all of its workers, they are ready, and no other is left."""
        if len(self.workers) != sum(self.desired):
            return False
        if any(w.revision != self.target or w.state != READY for w in self.workers):
            return False
        return sum(w.role is Role.PREFILL for w in self.workers) == self.desired.prefill


def _count(workers: list[Worker]) -> Workers:
    states = [worker.state for worker in workers]
    draining = [worker for worker in workers if worker.state == DRAINING]
    pending = [worker for worker in workers if worker.state == PENDING]
    return Workers(
        ready=states.count(READY),
        pending=len(pending),
        draining=len(draining),
        returnable=sum(worker.placed for worker in draining),
        unplaced=sum(not worker.placed for worker in pending),
        failed=states.count(FAILED),
        youngest=max((worker.created for worker in workers if worker.state == READY), default=0),
    )
