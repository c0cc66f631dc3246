"""Whether a pair of workers moves KV whole: when it is taken out of use, and when it is back.

One fault can happen on a healthy link, so only several within a window take a pair out. It stays
out until a check has passed: a known pattern, moved several times after a time of rest. A fault
soon after that takes it out at once, for twice as long.
"""

from collections import deque

from tandem_engine.handoff.settings import HandoffSettings


class PairHealth:
    """The faults of one peer. Times are in seconds of any one clock that only goes forward."""

    def __init__(self, settings: HandoffSettings) -> None:
        self._limit = settings.fault_limit
        self._window = settings.fault_window_seconds
        self._first = settings.out_of_use_seconds
        self._most = settings.max_out_of_use_seconds
        self._recent: deque[float] = deque()
        self._rest = self._first
        self._trusted_at = 0.0
        self.num_faults = 0
        self.reason = ""
        self.out_of_use = False
        self.check_at = 0.0

    def note_fault(self, why: str, now: float) -> bool:
        """Count a fault; True if it takes the pair out of use."""
        self.num_faults += 1
        self.reason = why
        if self.out_of_use:
            return False
        self._recent.append(now)
        while self._recent[0] < now - self._window:
            self._recent.popleft()
        relapsed = now < self._trusted_at
        if len(self._recent) < self._limit and not relapsed:
            return False
        self._rest = min(self._most, 2 * self._rest) if relapsed else self._first
        self._take_out(now)
        return True

    def fail_check(self, why: str, now: float) -> None:
        """The pair still loses or changes bytes: it rests for twice as long."""
        self.reason = why
        self._rest = min(self._most, 2 * self._rest)
        self._take_out(now)

    def pass_check(self, now: float) -> None:
        """Use the pair again; for a while, one more fault is enough to take it out."""
        self.out_of_use = False
        self._trusted_at = now + max(self._window, self._rest)

    def _take_out(self, now: float) -> None:
        self.out_of_use = True
        self.check_at = now + self._rest
        self._recent.clear()
