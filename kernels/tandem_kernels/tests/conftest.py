"""Without a GPU the kernels run in Triton's interpreter, which must be chosen before the import."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, for the interpreter, in CI; the GPU with `-m gpu`."""
    torch.manual_seed(7)
    return torch.device(request.param)


@pytest.fixture
def half(device: torch.device) -> torch.dtype:
    """The 16-bit type to test with: the interpreter's products don't know bfloat16."""
    return torch.bfloat16 if device.type == "cuda" else torch.float16
