"""Fixtures of the server's tests."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from tandem_engine.server.tests.processes import until
from tandem_engine.server.tests.stage import Stage


@pytest.fixture(name="stage")
async def stage_fixture() -> AsyncIterator[Stage]:
    async with AsyncExitStack() as stack:
        stage = Stage()
        stack.push_async_callback(stage.stop)
        await until(lambda: stage.told, "the ports")
        yield stage
