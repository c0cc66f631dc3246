"""A circuit breaker per worker: after repeated failures it gets no requests for a while."""

FAILURES_TO_OPEN = 3
WINDOW_SECONDS = 10.0
FIRST_OPEN_SECONDS = 2.0
MAX_OPEN_SECONDS = 60.0


class CircuitBreaker:
    """Closed (requests pass), open (none), half open (one trial decides).

    It opens after `FAILURES_TO_OPEN` failures within `WINDOW_SECONDS`, for a time that doubles with
    every failed trial. It half-opens only when that time is over *and* the worker has answered a
    heartbeat since: the active probe. All times are of one monotonic clock, in seconds.
    """

    __slots__ = ("_failures", "_open_seconds", "_opened_at", "_trial")

    def __init__(self) -> None:
        self._failures: list[float] = []
        self._open_seconds = 0.0  # 0: closed
        self._opened_at = 0.0
        self._trial = False

    @property
    def is_open(self) -> bool:
        """True while requests are kept away, trials aside."""
        return self._open_seconds > 0.0

    def allows(self, now: float, probed_at: float) -> bool:
        """Whether a request may go there; `probed_at` is when the last heartbeat was answered."""
        if not self._open_seconds:
            return True
        over = now >= self._opened_at + self._open_seconds and probed_at > self._opened_at
        return over and not self._trial

    def on_submit(self) -> None:
        """A request was sent; while open it is the trial."""
        if self._open_seconds:
            self._trial = True

    def on_success(self) -> None:
        """The worker produced a token: all is well again."""
        if self._failures or self._open_seconds:
            self._failures.clear()
            self._open_seconds = 0.0
            self._trial = False

    def on_abandoned(self) -> None:
        """The trial ended without a verdict (the client left, or the worker was full)."""
        self._trial = False

    def on_failure(self, now: float) -> None:
        """The worker failed a request by its own fault."""
        if self._open_seconds:
            self._open_seconds = min(2 * self._open_seconds, MAX_OPEN_SECONDS)
            self._opened_at = now
            self._trial = False
            return
        self._failures = [at for at in self._failures if now - at < WINDOW_SECONDS]
        self._failures.append(now)
        if len(self._failures) >= FAILURES_TO_OPEN:
            self._failures.clear()
            self._open_seconds = FIRST_OPEN_SECONDS
            self._opened_at = now
