"""Compiling ahead. Without a GPU nothing is compiled: the test plays Triton's part."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deadlines import patience
from triton import knobs
from triton.runtime.jit import JITFunction

from tandem_kernels.compilation import UncompiledKernel, collect_kernels, compile_all, is_collecting


class Function:
    """A stand-in for the function that Triton hands to its hook."""

    __name__ = "some_kernel"

    def __init__(self) -> None:
        self.compiled: list[str] = []
        self.loaded: list[tuple[str, threading.Thread]] = []

    def preload(self, specialization: str) -> "Code":
        if specialization == "bad":
            raise ValueError("no such instruction")
        self.compiled.append(specialization)
        return Code(self, specialization)


class Code:
    """A compiled kernel: asking for `run` loads it."""

    def __init__(self, function: Function, name: str) -> None:
        self.src, self.metadata = function, name

    @property
    def run(self) -> None:
        if self.metadata == "too big":
            raise MemoryError("shared memory")
        self.src.loaded.append((self.metadata, threading.current_thread()))


class Driver:
    """A stand-in for Triton's driver, with nothing behind it."""

    def __init__(self) -> None:
        self.launchers: list[tuple[Any, str]] = []
        self.active = self

    def launcher_cls(self, function: Function, name: str) -> None:
        self.launchers.append((function, name))


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """Triton's driver, replaced by one that records what it is asked for."""
    found = Driver()
    monkeypatch.setattr("tandem_kernels.compilation.driver", found)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    return found


def launch(function: Function, key: str, specialization: str) -> bool:
    """Whether the hook tells Triton not to compile the kernel."""
    refused: bool = knobs.runtime.jit_cache_hook(
        key=key,
        repr="",
        fn=SimpleNamespace(jit_function=function),
        compile={"specialization_data": specialization},
        is_manual_warmup=False,
        already_compiled=False,
    )
    return refused


def test_every_kernel_is_noted_once_and_not_launched() -> None:
    first, second = Function(), Function()
    with collect_kernels() as found:
        assert launch(first, "a", "first a")
        assert launch(second, "a", "second a")
        assert launch(first, "a", "first a")
        assert launch(first, "b", "first b")
        assert found == []
    assert knobs.runtime.jit_cache_hook is None
    assert found == [
        UncompiledKernel(first, "first a"),
        UncompiledKernel(second, "second a"),
        UncompiledKernel(first, "first b"),
    ]


def test_what_is_compiled_is_not_launched_either(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def run(function: str, *args: Any, **options: Any) -> None:
        calls.append((function, args, options))

    monkeypatch.setattr(JITFunction, "run", run)
    with collect_kernels():
        assert is_collecting()
        JITFunction.run("kernel", 1, 2, grid=(3,), warmup=False, num_warps=4)
    JITFunction.run("kernel", 1, grid=(3,), warmup=False)
    assert calls == [
        ("kernel", (1, 2), {"grid": (3,), "warmup": True, "num_warps": 4}),
        ("kernel", (1,), {"grid": (3,), "warmup": False}),
    ]


def test_launches_are_as_before_after_an_error() -> None:
    run = JITFunction.run
    with pytest.raises(ZeroDivisionError), collect_kernels():
        raise ZeroDivisionError
    assert knobs.runtime.jit_cache_hook is None
    assert JITFunction.run is run
    assert not is_collecting()


def test_a_kernel_that_fails_does_not_hold_the_others_up(
    compiler: Driver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    devices: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    function = Function()
    names = ["a", "bad", "b", "too big", "c"]
    compile_all([UncompiledKernel(function, name) for name in names], 2)
    assert sorted(function.compiled) == ["a", "b", "c", "too big"]
    assert set(devices) == {3}
    assert [record.getMessage() for record in caplog.records] == [
        "some_kernel could not be compiled in advance: ValueError('no such instruction')",
        "some_kernel could not be compiled in advance: MemoryError('shared memory')",
    ]


def test_threads_build_launchers_and_one_thread_loads_them(
    compiler: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python mixes up extension modules of one name that threads load at the same time."""
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    function = Function()
    together = threading.Barrier(2, timeout=patience(20))
    build = compiler.launcher_cls

    def build_together(function: Function, name: str) -> None:
        build(function, name)
        together.wait()

    monkeypatch.setattr(compiler, "launcher_cls", build_together)
    compile_all([UncompiledKernel(function, name) for name in "abcd"], 2)
    assert sorted(name for _, name in compiler.launchers) == ["a", "b", "c", "d"]
    assert function.loaded == [(name, threading.current_thread()) for name in "abcd"]


@pytest.mark.gpu
def test_a_collected_kernel_is_compiled_for_its_launch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from tandem_kernels.norm import kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    x = torch.randn(3, 200, device="cuda")
    weight = torch.ones(200, device="cuda")
    out = torch.full_like(x, -1.0)
    kernel.rms_norm_kernel.device_caches.clear()
    with collect_kernels() as found:
        kernel.rms_norm(x, weight, 1e-6, out=out)
    assert torch.equal(out, torch.full_like(x, -1.0))
    assert len(found) == 1
    compile_all(found, 1)
    with collect_kernels() as more:
        kernel.rms_norm(x, weight, 1e-6, out=out)
    assert not more
    kernel.rms_norm(x, weight, 1e-6, out=out)
    assert torch.allclose(out, torch.nn.functional.rms_norm(x, (200,), eps=1e-6), atol=1e-5)
