"""Waiting in tests: for a condition, with a deadline."""

import asyncio
from collections.abc import Callable

from deadlines import patience


async def until(check: Callable[[], bool], seconds: float = 5.0) -> None:
    """Return when `check` holds. Raises TimeoutError."""
    async with asyncio.timeout(patience(seconds)):
        while not check():  # noqa: ASYNC110  what is waited for sets no event
            await asyncio.sleep(0.005)
