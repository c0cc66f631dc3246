"""Settings that must be in place before any test imports torch or triton, and time limits."""

import os
from pathlib import Path
from typing import Any

import pytest
import pytest_timeout
from deadlines import patience
from hypothesis import settings

# A busy machine may stop any example for longer than a time that would tell of a fault.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

# Idle OpenMP threads spin by default. On a busy machine that makes small models 10 to 30 times
# slower (measured with other test processes on the same two cores).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Triton decides at import whether its own library is interpreted, and torch imports triton.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> bool | None:
    """Give a busy machine as much more time for a test as its waits give themselves."""
    longer = settings._replace(timeout=patience(settings.timeout))
    done: bool | None = pytest_timeout.pytest_timeout_set_timer(item, longer)
    return done
