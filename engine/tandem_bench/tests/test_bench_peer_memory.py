"""How owner and writer are started; what they measure needs two GPUs."""

import subprocess
import sys
from typing import Any

import pytest

from tandem_bench.errors import NoGpuError, WorkloadError
from tandem_bench.handoff import peer_memory
from tandem_bench.handoff.peer_memory import CASES, Options, run, run_pair, start


class Started:
    """Records how a process is started, and is one that ends at once."""

    def __init__(self, command: list[str], *, env: dict[str, str], **pipes: Any) -> None:
        self.command = command
        self.visible = env.get("CUDA_VISIBLE_DEVICES")


@pytest.mark.parametrize(
    ("case", "visible", "devices", "hidden"),
    [
        ("both see both GPUs", [None, None], ["0", "1"], False),
        ("one visible GPU each", ["0", "1"], ["0", "0"], False),
        ("all namespaces", ["0", "1"], ["0", "0"], False),
        ("all, own device file only", ["0", "0"], ["0", "0"], True),
    ],
)
def test_each_process_sees_what_its_case_says(
    case: str,
    visible: list[str | None],
    devices: list[str],
    hidden: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(subprocess, "Popen", Started)
    sides: list[Any] = [start(role, CASES[case], "here", ["one"]) for role in ("owner", "writer")]
    assert [side.visible for side in sides] == visible
    for number, side in enumerate(sides):
        command = side.command
        module = command.index("-m")
        assert tuple(command[: module - 1]) == CASES[case].prefix
        assert command[module + 1] == "tandem_bench.handoff.peer_sides"
        assert command[command.index("--device") + 1] == devices[number]
        assert ("--hide" in command) == hidden
        assert not hidden or command[-1] == str(number)


def test_a_process_that_ends_is_the_methods_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "false")
    assert run_pair(CASES["both see both GPUs"], ["first", "second"]) == [
        {"method": "first", "error": "no answer"}
    ]


def test_an_unknown_case_is_named_before_a_gpu_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WorkloadError, match="there is no case called 'none'"):
        run(Options(cases=("none",)))

    def refuse() -> None:
        raise NoGpuError("no GPU")

    monkeypatch.setattr(peer_memory, "require_two_gpus", refuse)
    with pytest.raises(NoGpuError):
        run(Options())
