"""A process is known by its pid and start time: a recycled pid is never touched."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace

import pytest
from deadlines import patience

from tandem_local.machine.process import ProcessRef, end, marked, members, namespace, wait_gone


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(
        ["sleep", "600"], env=os.environ | {"LOCAL_TEST_MARK": f"m{os.getpid()}"}
    ) as child:
        yield child
        child.kill()


def ref_of(child: subprocess.Popen[bytes]) -> ProcessRef:
    ref = ProcessRef.of(child.pid)
    assert ref is not None
    return ref


def test_a_living_process_is_alive(sleeper: subprocess.Popen[bytes]) -> None:
    ref = ref_of(sleeper)
    assert ref.alive()
    assert ref.rss_bytes() > 0
    assert ProcessRef.from_data(ref.to_data()) == ref


def test_another_process_of_the_same_pid_is_not_it(sleeper: subprocess.Popen[bytes]) -> None:
    recycled = replace(ref_of(sleeper), start=ref_of(sleeper).start - 1)
    assert not recycled.alive()
    assert not recycled.signal(signal.SIGKILL)
    assert end([recycled], grace_s=0) == []
    assert sleeper.poll() is None, "the bystander lives"


def test_a_zombie_is_dead(sleeper: subprocess.Popen[bytes]) -> None:
    ref = ref_of(sleeper)
    sleeper.kill()
    assert wait_gone([ref], timeout_s=patience(10)) == []
    assert sleeper.returncode is None, "no one has waited for it yet"
    assert not ref.alive()
    assert ProcessRef.of(sleeper.pid) is None


def test_the_stubborn_are_killed() -> None:
    script = "trap '' TERM; echo on; while :; do sleep 0.1; done"
    with subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert end([ref_of(child)], grace_s=0.2) == []
    assert child.returncode == -signal.SIGKILL


def test_marked_processes_are_found(sleeper: subprocess.Popen[bytes]) -> None:
    value = f"m{os.getpid()}"
    assert ref_of(sleeper) in marked("LOCAL_TEST_MARK", value)
    assert ref_of(sleeper) not in marked("LOCAL_TEST_MARK", value[:-1])


def test_members_of_a_namespace_are_found(sleeper: subprocess.Popen[bytes]) -> None:
    mine = namespace("self", "mnt")
    assert mine is not None
    assert ref_of(sleeper) in members({mine})
    assert members({"mnt:[0]"}) == []
    assert namespace(2**22 + 1, "mnt") is None
