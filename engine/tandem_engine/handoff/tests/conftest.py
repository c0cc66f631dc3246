"""Fixtures of the hand-off's tests."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tandem_engine.handoff.tests.transport_list import TRANSPORTS


@pytest.fixture(name="stack")
def stack_fixture() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture(name="over", params=TRANSPORTS)
def over_fixture(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """The options of a worker, for each transport."""
    return {"transport": request.param, "shm_dir": str(tmp_path)}
