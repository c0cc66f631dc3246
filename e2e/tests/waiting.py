"""Waiting for a condition with a deadline; the only place in these tests that pauses."""

import time
from collections.abc import Callable
from typing import TypeVar

from deadlines import patience

T = TypeVar("T")


def wait_for(what: str, probe: Callable[[], T | None], seconds: float = 60.0) -> T:
    """Poll `probe` until its value is true. AssertionError with the last one if it never is."""
    limit = patience(seconds)
    deadline = time.monotonic() + limit
    while True:
        value = probe()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not true after {limit:.0f} s; last value: {value!r}")
        time.sleep(0.2)
