"""How many cores this process may keep busy: those it may run on, within its control group's quota.

A container's CPU limit is a quota of time, which the kernel enforces by stopping all its threads.
As many threads as the machine has cores would use it up at once and then wait.
"""

import math
import os
from pathlib import Path

UNIFIED = Path("sys/fs/cgroup")
LEGACY = ("sys/fs/cgroup/cpu", "sys/fs/cgroup/cpu,cpuacct")


def count_cores(root: Path = Path("/")) -> int:
    """At least 1. `root` is where /proc and /sys are."""
    allowed = len(os.sched_getaffinity(0))
    quotas = [*_unified_quotas(root), *_legacy_quotas(root)]
    return max(1, math.ceil(min([allowed, *quotas])))


def _unified_quotas(root: Path) -> list[float]:
    """The quotas in cores of the group and of those around it, by version 2's `cpu.max`."""
    groups = [UNIFIED / group for group in _groups(root, "")]
    return [
        int(quota) / int(period)
        for group in groups
        for quota, _, period in [_read(root / group / "cpu.max").partition(" ")]
        if quota.isdigit() and period.strip().isdigit()
    ]


def _legacy_quotas(root: Path) -> list[float]:
    """The same by version 1, which writes -1 where there is no limit."""
    groups = [Path(place) / group for place in LEGACY for group in _groups(root, "cpu")]
    return [
        int(quota) / int(period)
        for group in groups
        for quota in [_read(root / group / "cpu.cfs_quota_us").strip()]
        for period in [_read(root / group / "cpu.cfs_period_us").strip()]
        if quota.isdigit() and period.isdigit()
    ]


def _groups(root: Path, controller: str) -> list[str]:
    """The process's group of a controller and the groups around it, down from the outermost.

    In a namespace of its own, a container is in the outermost one.
    """
    found = [""]
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            parts = [part for part in path.split("/") if part not in ("", "..")]
            found += ["/".join(parts[: count + 1]) for count in range(len(parts))]
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
