"""Processes that outlive the Python process that started them.

A pid alone says little, because the kernel reuses it: a process is identified by its pid *and* its
start time.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")


@dataclass(frozen=True)
class ProcessRef:
    """One process, which no other can be mistaken for."""

    pid: int
    start: int
    """Start time in clock ticks since boot, field 22 of /proc/PID/stat."""

    @classmethod
    def of(cls, pid: int) -> ProcessRef | None:
        """The living process with this pid; None if there is none, or only a zombie."""
        stat = _stat(pid)
        if stat is None or stat[0] in "ZX":
            return None
        return cls(pid, stat[1])

    def alive(self) -> bool:
        """Whether it is still running (a zombie is not)."""
        return ProcessRef.of(self.pid) == self

    def signal(self, number: int) -> bool:
        """Send it a signal; False if the process is gone."""
        if not self.alive():
            return False
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            return False
        return True

    def rss_bytes(self) -> int:
        """Its resident memory; 0 if it is gone."""
        try:
            text = (PROC / str(self.pid) / "status").read_text()
        except OSError:
            return 0
        for line in text.splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        return 0

    def to_data(self) -> dict[str, int]:
        """The process as JSON data."""
        return {"pid": self.pid, "start": self.start}

    @classmethod
    def from_data(cls, data: dict[str, int]) -> ProcessRef:
        """The inverse of `to_data`."""
        return cls(data["pid"], data["start"])


def boot_id() -> str:
    """The identity of this boot; every process recorded under another one is gone."""
    return (PROC / "sys/kernel/random/boot_id").read_text().strip()


def end(refs: Iterable[ProcessRef], *, grace_s: float) -> list[ProcessRef]:
    """SIGTERM, then SIGKILL after up to `grace_s` seconds; returns the processes that survived."""
    living = [ref for ref in refs if ref.alive()]
    if grace_s > 0:
        for ref in living:
            ref.signal(signal.SIGTERM)
        living = wait_gone(living, timeout_s=grace_s)
    for ref in living:
        ref.signal(signal.SIGKILL)
    return wait_gone(living, timeout_s=10.0)


def wait_gone(refs: Iterable[ProcessRef], *, timeout_s: float) -> list[ProcessRef]:
    """Wait until all have ended; returns those that are still alive when the time is up."""
    deadline = time.monotonic() + timeout_s
    living = [ref for ref in refs if ref.alive()]
    while living and time.monotonic() < deadline:
        time.sleep(0.02)
        living = [ref for ref in living if ref.alive()]
    return living


def all_pids() -> Iterator[int]:
    """Every pid on the machine."""
    for entry in os.listdir(PROC):
        if entry.isdigit():
            yield int(entry)


def marked(variable: str, value: str) -> list[ProcessRef]:
    """The processes that were started with `variable=value` in their environment."""
    wanted = f"{variable}={value}".encode()
    found = []
    for pid in all_pids():
        try:
            environment = (PROC / str(pid) / "environ").read_bytes()
        except OSError:
            continue
        if wanted in environment.split(b"\0") and pid != os.getpid():
            ref = ProcessRef.of(pid)
            if ref is not None:
                found.append(ref)
    return found


def namespace(pid: int | str, kind: str) -> str | None:
    """The identity of a process's namespace (`net`, `mnt`…); None if the process is gone."""
    try:
        return os.readlink(PROC / str(pid) / "ns" / kind)
    except OSError:
        return None


def members(namespaces: set[str], kinds: Iterable[str] = ("net", "mnt")) -> list[ProcessRef]:
    """The processes that live in any of the namespaces."""
    found = []
    for pid in all_pids():
        if any(namespace(pid, kind) in namespaces for kind in kinds):
            ref = ProcessRef.of(pid)
            if ref is not None:
                found.append(ref)
    return found


def _stat(pid: int) -> tuple[str, int] | None:
    try:
        text = (PROC / str(pid) / "stat").read_text()
    except OSError:
        return None
    # The second field is the name in parentheses, and that may contain any character.
    fields = text[text.rindex(")") + 2 :].split()
    return fields[0], int(fields[19])
