"""A launcher finds the code that Triton would, and only that. Kernels are stand-ins here."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tandem_kernels.compilation import collect_kernels
from tandem_kernels.launch import Launcher


class Code:
    """Compiled code, which records its launches."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        return lambda *args: self.launches.append((grid, *args))


class Kernel:
    """A kernel that compiles at every call."""

    arg_names = ("x", "count", "BLOCK", "PDL")

    def __init__(self) -> None:
        self.compiled: list[Code] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., Code]:
        def compile_and_launch(*args: Any, **options: Any) -> Code:
            self.compiled.append(Code())
            return self.compiled[-1]

        return compile_and_launch


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(triton.runtime, "JITFunction", Kernel)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return Kernel()


def test_code_is_found_again(kernel: Kernel) -> None:
    launch, x = Launcher(kernel), torch.zeros(64)
    options = {"BLOCK": 32, "PDL": False, "num_warps": 4}
    launch((1, 1, 1), x, 5, **options)
    other = torch.ones(64)
    launch((7, 1, 1), other, 5, **options)
    (code,) = kernel.compiled
    ((grid, tensor, *numbers),) = code.launches
    assert (grid, numbers) == ((7, 1, 1), [5, 32, False])
    assert tensor is other


def test_code_is_not_launched_while_kernels_are_collected(kernel: Kernel) -> None:
    launch, x = Launcher(kernel), torch.zeros(64)
    launch((1, 1, 1), x, 5, BLOCK=32, PDL=False)
    with collect_kernels():
        launch((1, 1, 1), x, 5, BLOCK=32, PDL=False)  # Triton is asked, and launches nothing
    assert [code.launches for code in kernel.compiled] == [[], []]
    launch((1, 1, 1), x, 5, BLOCK=32, PDL=False)
    assert [len(code.launches) for code in kernel.compiled] == [1, 0]


def test_whatever_triton_specialises_by_is_other_code(kernel: Kernel) -> None:
    launch, x = Launcher(kernel), torch.zeros(64)
    calls = [(x, 5, 32, 4), (x[1:], 5, 32, 4), (x.half(), 5, 32, 4), (x, 16, 32, 4)]
    calls += [(x, 5, 64, 4), (x, 5, 32, 8)]
    for _ in range(2):
        for tensor, count, block, warps in calls:
            launch((1, 1, 1), tensor, count, BLOCK=block, PDL=False, num_warps=warps)
    assert [len(code.launches) for code in kernel.compiled] == [1] * len(calls)


def test_descriptors_are_told_apart_by_type_and_box(kernel: Kernel) -> None:
    launch, layout = Launcher(kernel), gl.NVMMASharedLayout(128, 16, 2)
    for tensor, rows in [
        (torch.zeros(64, 64), 8),
        (torch.ones(64, 64), 8),
        (torch.zeros(9, 64), 4),
    ]:
        shape, half = list(tensor.shape), tensor.half()
        launch(
            (1, 1, 1),
            TensorDescriptor(half, shape, [64, 1], [rows, 64], layout),
            5,
            BLOCK=1,
            PDL=False,
        )
    assert [len(code.launches) for code in kernel.compiled] == [1, 0]


def test_too_many_are_forgotten(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem_kernels.launch._MOST_KNOWN", 3)
    launch, x = Launcher(kernel), torch.zeros(64)
    for count in [*range(2, 6), 5, 2]:
        launch((1, 1, 1), x, count, BLOCK=1, PDL=False)
    assert len(kernel.compiled) == 5
