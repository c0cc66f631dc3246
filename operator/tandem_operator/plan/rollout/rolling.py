"""How one revision replaces another in both pools at once: a pure step function over integers.

Bounds, in each pool: never more workers than `desired + surge`, and no drain that takes the
available ones below `desired - unavailable`. A worker is available if it is ready and its revision
has a ready worker of the other role as well, since KV never crosses a revision. So the last pair of
a revision goes together, and only when the others suffice.

The pools move in ratio: a drain must leave enough workers that find peers in their own revision
(`balanced`). Pools that are too small for that (two prefill workers can't be split in ratio) go on
without, when nothing else can happen any more.

Until the target serves, the revision that served before is kept up: its workers that die are
replaced, and none is taken away for the new one while surge finds places.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from tandem_operator.pair import Pair, Role
from tandem_operator.plan.rollout.counts import (
    NONE,
    Counts,
    Goal,
    Workers,
    available,
    balanced,
    is_paired,
)


@dataclass(frozen=True)
class RollingStep:
    """How many live workers each revision should have now; those not named should have none."""

    live: dict[str, Pair[int]]

    def of(self, revision: str) -> Pair[int]:
        """The number of live workers of both roles."""
        return self.live.get(revision, Pair(0, 0))


def plan_rolling(seen: Counts, goal: Goal) -> RollingStep:
    """The next step. The same counts give the same step."""
    counts = _paused(seen, goal) if goal.paused else _moved(seen, goal)
    return RollingStep({name: pair.map(lambda each: each.live) for name, pair in counts.of.items()})


def needed(goal: Goal) -> Pair[int]:
    """The roles without which a revision doesn't serve.

    A pool that may be empty for a moment (its floor is 0) can't be what the other pool waits for.
    """
    return goal.floor.map(lambda floor: 1 if floor else 0)


def serves(workers: Pair[Workers], goal: Goal) -> bool:
    """Whether the workers of one revision serve requests as they should."""
    return is_paired(workers, goal.desired)


def _moved(seen: Counts, goal: Goal) -> Counts:
    step = _Moves(seen, goal)
    step.shrink_target()
    step.drop_useless()
    step.hold_fallback()
    step.grow(goal.target)
    step.drain_old(in_ratio=True)
    if step.quiet:
        step.drain_old(in_ratio=False)
    if step.quiet:
        step.merge_old()
    if step.quiet:
        step.yield_places()
    return step.counts


class _Moves:
    """The decisions of one step, each on top of those before."""

    def __init__(self, seen: Counts, goal: Goal) -> None:
        self.seen = seen
        self.counts = seen
        self.goal = goal
        self.cap = goal.cap
        self.least = goal.floor
        self.needed = needed(goal)
        self.proven = serves(seen.get(goal.target), goal)

    @property
    def old(self) -> list[str]:
        """The revisions other than the target."""
        return [name for name in self.counts.of if name != self.goal.target]

    @property
    def quiet(self) -> bool:
        """Whether nothing is decided yet, and nothing that could change the numbers is under way.

        What the scheduler finds no node for doesn't count: it may wait for ever.
        """
        if self.counts != self.seen:
            return False
        for name, pair in self.seen.of.items():
            for each in pair:
                if each.draining or (name == self.goal.target and each.pending > each.unplaced):
                    return False
        return True

    def room(self, role: Role) -> int:
        """How many workers of a role may be created; no surge while new ones find no node."""
        most = self.goal.desired if self.unplaced else self.cap
        return max(most.of(role) - self.counts.total(role), 0)

    @property
    def unplaced(self) -> bool:
        """Whether the scheduler finds no node for some of the target's workers."""
        return any(each.unplaced for each in self.seen.get(self.goal.target))

    def lack(self, role: Role) -> int:
        """How many workers of a role the target lacks."""
        live = self.counts.get(self.goal.target).of(role).live
        return max(self.goal.desired.of(role) - live, 0)

    def floor(self, role: Role) -> int:
        """How many workers of a role must stay available now."""
        spared = not self.proven and self.goal.surge.of(role) and not self.unplaced
        return (self.goal.desired if spared else self.least).of(role)

    def held_old(self, role: Role) -> int:
        """The live old workers that count until the target serves."""
        return sum(
            self.counts.get(name).of(role).live for name in self.old if self._counts_as_old(name)
        )

    def _counts_as_old(self, name: str) -> bool:
        return name == self.goal.fallback or is_paired(self.counts.get(name), self.needed)

    def shrink_target(self) -> None:
        """The target never has more workers than desired."""
        for role in Role:
            live = self.counts.get(self.goal.target).of(role).live
            surplus = live - self.goal.desired.of(role)
            if surplus > 0:
                self.counts = self.counts.drained(self.goal.target, role, surplus)

    def drop_useless(self) -> None:
        """The workers of an old revision that neither serves nor has to be kept up hold places."""
        for name in self.old:
            if self._counts_as_old(name):
                continue
            for role in Role:
                if number := self.counts.get(name).of(role).live:
                    self.counts = self.counts.drained(name, role, number)

    def hold_fallback(self) -> None:
        """Replace old workers that died, as long as the target doesn't serve."""
        if self.proven or not self.goal.fallback:
            return
        for role in Role:
            missing = self.least.of(role) - self.held_old(role)
            self._add(self.goal.fallback, role, missing)

    def grow(self, revision: str) -> None:
        """Create what a revision lacks, where there is room; the first two workers as a pair."""
        self._bring_back(revision)
        wanted = Pair.build(lambda role: self._missing(revision, role))
        number = Pair.build(lambda role: min(wanted.of(role), self.room(role)))
        live = self.counts.get(revision).map(lambda each: each.live)
        for role, other in ((Role.PREFILL, Role.DECODE), (Role.DECODE, Role.PREFILL)):
            alone = not live.of(other) and not number.of(other) and self.goal.desired.of(other)
            if not alone:
                self._add(revision, role, number.of(role))

    def _missing(self, revision: str, role: Role) -> int:
        return max(self.goal.desired.of(role) - self.counts.get(revision).of(role).live, 0)

    def _bring_back(self, revision: str) -> None:
        for role in Role:
            each = self.counts.get(revision).of(role)
            if number := min(each.returnable, self._missing(revision, role)):
                self.counts = self.counts.returned(revision, role, number)

    def _add(self, revision: str, role: Role, wanted: int) -> None:
        each = self.counts.get(revision).of(role)
        back = max(min(each.returnable, wanted), 0)
        if back:
            self.counts = self.counts.returned(revision, role, back)
        number = min(wanted - back, self.room(role))
        if number > 0:
            self.counts = self.counts.added(revision, role, number)

    def drain_old(self, *, in_ratio: bool) -> None:
        """Drain as many old workers as the bounds allow and the target can use."""
        while choice := next(self._drainable(in_ratio), None):
            self.counts = self.counts.drained(*choice)
            if not in_ratio:
                return

    def _drainable(self, in_ratio: bool) -> Iterator[tuple[str, Role]]:
        """The workers that may go, the best choice first."""
        roles = sorted(Role, key=self._excess, reverse=True)
        merged = self._merged()
        old = sorted(self.old, key=self._can_start if merged else self._is_kept_up)
        for role in roles:
            if not self._useful(role, in_ratio):
                continue
            for name in old:
                if name == merged and self.counts.get(name).of(role).pending:
                    continue  # it is made to let one of another revision go
                if self.counts.get(name).of(role).live and self._may_go(name, role, in_ratio):
                    yield name, role

    def _is_kept_up(self, name: str) -> tuple[bool, int]:
        return name == self.goal.fallback, self._size(name)

    def _excess(self, role: Role) -> int:
        """The old workers in thousandths of the pool: the pool that is behind goes first."""
        live = sum(self.counts.get(name).of(role).live for name in self.old)
        return 1000 * live // max(self.goal.desired.of(role), 1)

    def _size(self, name: str) -> int:
        return sum(each.live for each in self.counts.get(name))

    def _useful(self, role: Role, in_ratio: bool) -> bool:
        """Whether the target can use the place, or there are more workers than desired."""
        ready = self.counts.get(self.goal.target).of(role).ready
        if self.held_old(role) + ready > self.goal.desired.of(role):
            return True
        leaving = sum(pair.of(role).draining for pair in self.counts.of.values())
        if self.counts.get(self.goal.target).of(role).unplaced > leaving:
            return True
        return self.lack(role) > self._coming(role) and self._has_peer(role, in_ratio)

    def _coming(self, role: Role) -> int:
        """The places that are free or will be; less than 0 after a pool was made smaller."""
        leaving = sum(pair.of(role).draining for pair in self.counts.of.values())
        return self.cap.of(role) - self.counts.total(role) + leaving

    def _has_peer(self, role: Role, in_ratio: bool) -> bool:
        """Whether the target has workers of the other role, or can get one as well."""
        other = Role.DECODE if role is Role.PREFILL else Role.PREFILL
        return bool(
            not self.goal.desired.of(other)
            or self.counts.get(self.goal.target).of(other).live
            or self._coming(other) > 0
            or any(
                self.counts.get(name).of(other).live and self._may_go(name, other, in_ratio)
                for name in self.old
            )
        )

    def _may_go(self, name: str, role: Role, in_ratio: bool) -> bool:
        after = self.counts.drained(name, role)
        before = available(self.counts, self.needed)
        left = available(after, self.needed)
        for each in Role:
            if left.of(each) < min(before.of(each), self.floor(each)):
                return False
        if self.held_old(role) - 1 + self._proven_ready(role) < self.least.of(role):
            return False
        if not in_ratio:
            return True
        matched = balanced(after, self.needed, self.goal.desired)
        now = balanced(self.counts, self.needed, self.goal.desired)
        return all(matched.of(each) >= min(now.of(each), self.floor(each)) for each in Role)

    def yield_places(self) -> None:
        """Give the surge of one role up where workers of the other one find no node."""
        target = self.counts.get(self.goal.target)
        for role, each in target.items():
            surplus = self._live(role) > self.goal.desired.of(role)
            if self.unplaced and surplus and each.live > max(each.unplaced, 1):
                number = max(each.unplaced, 1)
                self.counts = self.counts.drained(self.goal.target, role, number)
                return

    def keep_split(self) -> None:
        """Replace workers in their own revision; what else is missing goes to the largest one."""
        for role in Role:
            for name in self.counts.of:
                missing = self.goal.desired.of(role) - self._live(role)
                self._add(name, role, min(missing, self.seen.get(name).of(role).failed))
            names = [*self.old, self.goal.target, self.goal.fallback or self.goal.target]
            largest = max(names, key=lambda name: (self._size(name), name == self.goal.fallback))
            self._add(largest, role, self.goal.desired.of(role) - self._live(role))
            while self._live(role) > self.cap.of(role):
                name = max(self.counts.of, key=lambda name: self.counts.get(name).of(role).live)
                self.counts = self.counts.drained(name, role)

    def _live(self, role: Role) -> int:
        return sum(pair.of(role).live for pair in self.counts.of.values())

    def _proven_ready(self, role: Role) -> int:
        return self.counts.get(self.goal.target).of(role).ready if self.proven else 0

    def merge_old(self) -> None:
        """Free the last places of three revisions, of which none has a worker to spare.

        With one prefill worker each, neither of two old revisions can give up its own for the
        target. The decode workers then move to one of the two, until the other has none to serve:
        to the one whose workers started last, since those of the other one may fail by now.
        """
        kept = self._merged()
        if not kept:
            return
        useless = [role for role in Role if self.counts.get(self.goal.target).of(role).live]
        if useless:
            for role in useless:
                live = self.counts.get(self.goal.target).of(role).live
                self.counts = self.counts.drained(self.goal.target, role, live)
            return
        old = self._serving_old()
        for role in Role:
            if self.room(role) and self._missing(kept, role):
                self._add(kept, role, 1)
                return
        if any(each.pending > each.unplaced for name in old for each in self.seen.get(name)):
            return
        for role in Role:
            for name in old:
                if name != kept and self._may_go(name, role, in_ratio=False):
                    self.counts = self.counts.drained(name, role)
                    return

    def _serving_old(self) -> list[str]:
        return [name for name in self.old if is_paired(self.seen.get(name), self.needed)]

    def _merged(self) -> str:
        """Into which of several old revisions the others go before the target comes; "" if none."""
        old = self._serving_old()
        return max(old, key=self._can_start) if not self.proven and len(old) > 1 else ""

    def _can_start(self, name: str) -> tuple[bool, int, bool, int, str]:
        """What speaks for it that more workers of a revision would become ready, the best first."""
        pair = self.seen.get(name)
        return (
            not any(each.failed for each in pair),
            max(each.youngest for each in pair),
            name == self.goal.fallback,
            self._size(name),
            name,
        )


def _paused(seen: Counts, goal: Goal) -> Counts:
    """Keep the revisions as they are: replace what died where it died, follow the load."""
    step = _Moves(seen, goal)
    if not any(seen.get(name) != NONE for name in step.old) and not goal.fallback:
        return _moved(seen, goal)
    step.keep_split()
    return step.counts
