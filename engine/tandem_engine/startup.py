"""Where the time of a start goes, stage by stage, from the first process on."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

Listener = Callable[[str, float], None]
"""Called with a stage's name and the fraction of it that is done, 0 to 1."""

_TICKS: Final = os.sysconf("SC_CLK_TCK")
_FIRST_STAGE: Final = "import"
_SAME: Final = {"starting": "import", "importing": "import", "torch": "import"}
"""The name that a stage has while it lasts → the name it is counted under."""


def boot_seconds() -> float:
    """Now, on a clock that all processes of a machine share and that /proc counts in too."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def process_start() -> float:
    """When this process was started, on the clock of `boot_seconds`."""
    # After the name, which may hold anything: fields 3 and on (proc(5)); 22 is the start.
    fields = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()
    return int(fields[19]) / _TICKS


@dataclass(frozen=True, slots=True)
class StartReport:
    """Seconds by stage, in order; `num_weight_bytes` is 0 if no one counted."""

    stages: dict[str, float]
    num_weight_bytes: int = 0

    @property
    def seconds(self) -> float:
        """From the start of the first process until it was ready."""
        return sum(self.stages.values())

    def as_json(self) -> dict[str, Any]:
        """The report for /state and the log."""
        stages = {stage: round(seconds, 3) for stage, seconds in self.stages.items()}
        return {
            "seconds": round(self.seconds, 3),
            "stages": stages,
            "num_weight_bytes": self.num_weight_bytes,
        }

    def describe(self) -> str:
        """One line, such as "started in 12.1 s: import 6.1, weights 3.0 (5.4 GB/s), graphs 3.0"."""
        parts = []
        for stage, seconds in self.stages.items():
            rate = self.num_weight_bytes / seconds / 1e9 if stage == "weights" and seconds else 0.0
            parts.append(f"{stage} {seconds:.1f}" + (f" ({rate:.1f} GB/s)" if rate else ""))
        return f"started in {self.seconds:.1f} s: {', '.join(parts)}"


class Startup:
    """Follows a start: call it with each stage as it goes on; a new name ends the stage before.

    A stage that comes again adds to its time. `began` is on the clock of `boot_seconds`; None means
    now. The thread that starts the worker owns it.
    """

    def __init__(
        self,
        listener: Listener | None = None,
        began: float | None = None,
        clock: Callable[[], float] = boot_seconds,
    ) -> None:
        self._listener = listener
        self._clock = clock
        self._since = clock() if began is None else began
        self._stage = _FIRST_STAGE
        self._seconds: dict[str, float] = {}
        self._num_weight_bytes = 0

    def __call__(self, stage: str, fraction: float) -> None:
        """`stage` is going on, and `fraction` of it is done."""
        self._enter(_SAME.get(stage, stage))
        if self._listener is not None:
            self._listener(stage, fraction)

    def count_weights(self, num_bytes: int) -> None:
        """Add bytes of parameters that were loaded."""
        self._num_weight_bytes += num_bytes

    def report(self) -> StartReport:
        """The stages so far, including the present one up to now."""
        self._enter(self._stage)
        return StartReport(dict(self._seconds), self._num_weight_bytes)

    def _enter(self, stage: str) -> None:
        now = self._clock()
        self._seconds[self._stage] = self._seconds.get(self._stage, 0.0) + now - self._since
        self._stage, self._since = stage, now
