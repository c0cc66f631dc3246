"""How long tests wait: what a free machine needs with a wide margin, and more on a busy one.

A deadline only ends a test that has failed, so a long one costs nothing. Every test that waits by
the clock takes its limit from here, and so does pytest-timeout (conftest.py).
"""

import os
from pathlib import Path

MARGIN = 2.0
# Beyond this a machine isn't busy but stuck.
LIMIT = 10.0


def patience(seconds: float) -> float:
    """The limit for what takes less than `seconds` on a free machine, for the load of this moment.

    The load is the larger of the average over a minute and of what wants to run right now, which
    the average only learns later.
    """
    return seconds * min(LIMIT, MARGIN * max(1.0, _load() / (os.cpu_count() or 1)))


def _load() -> float:
    try:
        fields = Path("/proc/loadavg").read_text().split()
    except OSError:
        return os.getloadavg()[0]
    return max(float(fields[0]), float(fields[3].split("/")[0]))
