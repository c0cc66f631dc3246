"""Fixtures of the hand-off's tests."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tandem_engine.handoff.tests.children import Start, starter
from tandem_engine.handoff.tests.transport_list import TRANSPORTS


@pytest.fixture(name="stack")
def stack_fixture() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture(autouse=True)
def _loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """UCX would take any interface, also one of a cluster's that is being removed."""
    monkeypatch.setenv("UCX_NET_DEVICES", "lo")


@pytest.fixture(name="start")
def start_fixture() -> Iterator[Start]:
    with ExitStack() as stack:
        yield starter(stack)


@pytest.fixture(name="over", params=TRANSPORTS)
def over_fixture(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """The options of a worker, for each transport."""
    return {"transport": request.param, "shm_dir": str(tmp_path)}


@pytest.fixture(name="quiet")
def quiet_fixture() -> Iterator[None]:
    """Without logs: thousands of lost connections are no news in the protocol's model."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)
