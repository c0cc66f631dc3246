"""What the engine's tests share."""

from typing import Any

import pytest


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Any:
    """`--device` of a worker: the CPU in CI, and a GPU with `-m gpu`."""
    return request.param
