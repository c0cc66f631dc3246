"""Which prefill worker a decode worker pairs with, and which it passes over."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tandem_engine.handoff.events import (
    FetchDone,
    FetchFailed,
    PrefillArrived,
)
from tandem_engine.handoff.tests.scripted import LAYOUT, Worker, eventually, make


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hash_": "other"}, "compatibility hash"),
        ({"layout": msgspec.structs.replace(LAYOUT, num_kv_heads=4)}, "num_kv_heads"),
        ({"layout": msgspec.structs.replace(LAYOUT, tensor_parallel=2)}, "tensor_parallel"),
        ({"layout": msgspec.structs.replace(LAYOUT, num_planes=1)}, "num_planes"),
        ({"transport": "shm", "shm_dir": "/dev/shm"}, "no common transport"),
    ],
)
def test_an_unknown_pairing_is_refused(
    stack: ExitStack, changes: dict[str, Any], message: str
) -> None:
    p, d = make(stack, "p", **changes), make(stack, "d", transport="tcp")
    d.fetch("r", [p])
    failed = d.outcome("r")
    assert isinstance(failed, FetchFailed)
    assert message in failed.message
    assert p.handoff.counters()["kv_refused_pairings_total"] >= 1
    assert not [event for event in p.handoff.poll() if isinstance(event, PrefillArrived)]


def test_auto_falls_back_to_tcp_when_the_directories_differ(
    stack: ExitStack, tmp_path: Path
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    p = make(stack, "p", shm_dir=str(tmp_path / "a"))
    d = make(stack, "d", shm_dir=str(tmp_path / "b"))
    d.fetch("r", [p])
    p.push(p.arrived())
    done = d.outcome("r")
    assert isinstance(done, FetchDone)
    assert done.transport == "tcp"
    assert not list(tmp_path.glob("*/*"))


def test_another_worker_at_the_address_is_not_asked(stack: ExitStack) -> None:
    p, d = make(stack, "new"), make(stack, "d")
    p.name = "old"
    d.fetch("r", [p])
    failed = d.outcome("r")
    assert isinstance(failed, FetchFailed)
    assert "is now new, not old" in failed.message


def test_a_draining_peer_refuses_and_is_then_passed_over(stack: ExitStack) -> None:
    p, d = make(stack, "p"), make(stack, "d")
    p.handoff.set_draining(True)
    d.fetch("r", [p])
    failed = d.outcome("r")
    assert isinstance(failed, FetchFailed)
    assert "draining" in failed.message
    p.handoff.set_draining(False)
    eventually(lambda: d.takes(p))


def test_a_dead_peer_comes_back(stack: ExitStack) -> None:
    """The blacklist ends by itself, and one dial serves everybody afterwards."""
    d = make(stack, "d")
    first = Worker("p")
    port = first.handoff.bootstrap_port
    assert d.takes(first)
    first.close()
    assert not d.takes(first)
    second = make(stack, "p", bootstrap_port=port)
    eventually(lambda: d.takes(second))
