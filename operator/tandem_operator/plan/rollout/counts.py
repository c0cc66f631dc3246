"""The workers of a service as numbers: all that the next step of a roll-out depends on."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from tandem_operator.pair import Pair, Role


@dataclass(frozen=True)
class Workers:
    """The workers of one role and revision.

    `draining` ones, and those that are being deleted, still hold their places; failed ones don't.
    """

    ready: int = 0
    pending: int = 0  # not ready yet, or not any more
    draining: int = 0
    returnable: int = 0  # of `draining`: could take work again
    unplaced: int = 0  # of `pending`: the scheduler finds no node for them
    failed: int = 0
    youngest: int = 0  # of `ready`: when the last one was made, in seconds

    @property
    def live(self) -> int:
        """Those that count as workers."""
        return self.ready + self.pending

    @property
    def held(self) -> int:
        """The places that are taken."""
        return self.live + self.draining


NONE = Pair(Workers(), Workers())
"""No worker of either role."""


@dataclass(frozen=True)
class Goal:
    """What a roll-out has to reach, and the bounds on the way.

    `fallback` is the revision that served before and of which workers can still be made; "" if
    there is none. It is kept up until the target serves.
    """

    target: str
    desired: Pair[int]
    surge: Pair[int]
    unavailable: Pair[int]
    fallback: str = ""
    paused: bool = False

    @property
    def cap(self) -> Pair[int]:
        """How many workers of each role there may be."""
        return Pair.build(lambda role: self.desired.of(role) + self.surge.of(role))

    @property
    def floor(self) -> Pair[int]:
        """How many workers of each role have to be available."""
        return Pair.build(
            lambda role: max(self.desired.of(role) - self.unavailable.of(role), 0),
        )


@dataclass(frozen=True)
class Counts:
    """The workers of all revisions, in the middle of a decision or as they were observed."""

    of: Mapping[str, Pair[Workers]]

    def get(self, revision: str) -> Pair[Workers]:
        """The workers of a revision; none, if it isn't known."""
        return self.of.get(revision, NONE)

    def total(self, role: Role) -> int:
        """The places that all revisions take together."""
        return sum(pair.of(role).held for pair in self.of.values())

    def put(self, revision: str, role: Role, workers: Workers) -> "Counts":
        """A copy in which one entry is another one."""
        return Counts({**self.of, revision: self.get(revision).put(role, workers)})

    def drained(self, revision: str, role: Role, number: int = 1) -> "Counts":
        """A copy in which `number` workers drain: those that are not ready first."""
        old = self.get(revision).of(role)
        idle = min(old.pending, number)
        left = replace(
            old,
            pending=old.pending - idle,
            unplaced=max(old.unplaced - idle, 0),
            ready=old.ready - (number - idle),
            draining=old.draining + number,
        )
        assert left.ready >= 0, "only what is there can drain"
        return self.put(revision, role, left)

    def added(self, revision: str, role: Role, number: int) -> "Counts":
        """A copy with `number` more workers that are not ready."""
        old = self.get(revision).of(role)
        return self.put(revision, role, replace(old, pending=old.pending + number))

    def returned(self, revision: str, role: Role, number: int) -> "Counts":
        """A copy in which `number` workers that drained are needed again."""
        old = self.get(revision).of(role)
        new = replace(
            old,
            pending=old.pending + number,
            draining=old.draining - number,
            returnable=old.returnable - number,
        )
        return self.put(revision, role, new)


def is_paired(workers: Pair[Workers], needed: Pair[int]) -> bool:
    """Whether a revision serves: it has a ready worker of each role of which some are needed."""
    return any(each.ready for each in workers) and all(
        each.ready or not number for each, number in workers.zip(needed)
    )


def available(counts: Counts, needed: Pair[int]) -> Pair[int]:
    """The ready workers of the revisions that serve: KV never crosses a revision."""
    serving = [pair for pair in counts.of.values() if is_paired(pair, needed)]
    return Pair.build(lambda role: sum(pair.of(role).ready for pair in serving))


def balanced(counts: Counts, needed: Pair[int], desired: Pair[int]) -> Pair[int]:
    """The available workers that find enough of the other role in their own revision.

    Where the pools stand 1 to 2, a revision with one prefill and five decode workers counts as one
    with two decode workers: requests to the others would wait for prefill.
    """
    serving = [pair for pair in counts.of.values() if is_paired(pair, needed)]

    def matched(pair: Pair[Workers], role: Role, other: Role) -> int:
        ready, peers = pair.of(role).ready, pair.of(other).ready
        if not needed.of(other) or not desired.of(other):
            return ready
        return min(ready, -(-peers * desired.of(role) // desired.of(other)))

    return Pair(
        sum(matched(pair, Role.PREFILL, Role.DECODE) for pair in serving),
        sum(matched(pair, Role.DECODE, Role.PREFILL) for pair in serving),
    )
