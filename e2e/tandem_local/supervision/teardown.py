"""The end of a cluster, whatever state it is in.

A supervisor that is told to stop ends its own cluster this way; `up` and `down` do the same with
what a crashed supervisor has left behind. Every step can be repeated.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tandem_local.components.command_lines import MARKER
from tandem_local.errors import LocalError
from tandem_local.folders import ClusterFolder
from tandem_local.machine.process import ProcessRef, end, marked, members, namespace
from tandem_local.nodes import network
from tandem_local.supervision.state import ClusterState

# procri ends its containers when it is told to stop; nothing else is worth waiting for.
PROCRI_GRACE_S = 5.0


def end_processes(folder: ClusterFolder, state: ClusterState | None) -> None:
    """End every process of the cluster, including containers, and remove its link to the host.

    Raises LocalError, with their pids, if processes survive SIGKILL.
    """
    survivors: list[ProcessRef] = []
    namespaces: set[str] = set()
    if state is not None:
        for holder in state.holders.values():
            if holder.alive():
                for kind in ("net", "mnt"):
                    identity = namespace(holder.pid, kind)
                    if identity is not None and identity != namespace("self", kind):
                        namespaces.add(identity)
        # The kubelets first: they would restart what is ended before them.
        survivors += end(_running(state, {"kubelet"}), grace_s=0)
        survivors += end(_running(state, {"procri"}), grace_s=PROCRI_GRACE_S)
        survivors += end(state.processes(), grace_s=0)
    # Processes that no record names: started just before the supervisor died, or left by procri.
    survivors += end(container_processes(folder), grace_s=0)
    survivors += end(marked(MARKER, str(folder.root)), grace_s=0)
    if namespaces:
        survivors += end(members(namespaces), grace_s=0)
    network.disconnect(folder.root)
    left = [ref for ref in survivors if ref.alive()]
    if left:
        pids = ", ".join(str(ref.pid) for ref in left)
        raise LocalError(
            f"processes of cluster {folder.name} survive SIGKILL: {pids}. "
            "When they are gone, run `tandem cluster down` again"
        )


def remove_files(folder: ClusterFolder) -> None:
    """Remove the cluster's folder, after unmounting whatever is still mounted below it."""
    for point in mounts_below(folder.root):
        subprocess.run(["umount", "--lazy", str(point)], check=True, capture_output=True)
    if folder.root.exists():
        shutil.rmtree(folder.root)


def mounts_below(root: Path) -> list[Path]:
    """The mount points at or below `root` that this process sees, innermost first."""
    points = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        # Spaces and backslashes in a path are written as octal escapes.
        point = Path(line.split()[4].encode().decode("unicode_escape"))
        if point == root or root in point.parents:
            points.append(point)
    return sorted(points, key=lambda point: len(point.parts), reverse=True)


def container_processes(folder: ClusterFolder) -> list[ProcessRef]:
    """The first process of each container that procri's records name.

    A recorded pid may belong to another process by now. It counts only if the process lives in a
    mount namespace other than this one and has the cluster's folder in its mount table.
    """
    found = []
    for record in container_records(folder):
        pid = record.get("pid") or 0
        ref = ProcessRef.of(pid) if pid > 0 else None
        if ref is not None and _is_container(ref, folder):
            found.append(ref)
    return found


def container_records(folder: ClusterFolder) -> Iterable[dict[str, Any]]:
    """procri's records on all nodes, one per container."""
    for path in sorted(folder.root.glob("n*/procri/containers/*.json")):
        try:
            yield json.loads(path.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            # It is being removed or written at this moment.
            continue


def _is_container(ref: ProcessRef, folder: ClusterFolder) -> bool:
    mine = namespace("self", "mnt")
    if namespace(ref.pid, "mnt") in (None, mine):
        return False
    try:
        table = Path(f"/proc/{ref.pid}/mountinfo").read_text()
    except OSError:
        return False
    return os.fspath(folder.root) in table


def _running(state: ClusterState, names: set[str]) -> list[ProcessRef]:
    return [c.process for c in state.components if c.name in names and c.process is not None]
