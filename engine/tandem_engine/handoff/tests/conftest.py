"""Fixtures of the hand-off's tests."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest


@pytest.fixture(name="stack")
def stack_fixture() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack
