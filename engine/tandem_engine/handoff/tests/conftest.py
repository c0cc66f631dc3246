"""Fixtures of the hand-off's tests."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tandem_engine.handoff.tests.children import Start, starter


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
