"""The end of a cluster, whatever state it is in.

The supervisor ends its own cluster with this when told to; `up` and `down` run it over what a
crashed supervisor has left. Every step can be repeated.
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

# procri ends its containers when it is told to end; the rest holds nothing that is worth a wait.
PROCRI_GRACE_S = 5.0


def end_processes(folder: ClusterFolder, state: ClusterState | None) -> None:
    """End every process of the cluster, containers included, and its host link.

    Raises LocalError, naming them, where processes survive SIGKILL.
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
        # The kubelets first, or they would start again what is ended after them.
        survivors += end(_running(state, {"kubelet"}), grace_s=0)
        survivors += end(_running(state, {"procri"}), grace_s=PROCRI_GRACE_S)
        survivors += end(state.processes(), grace_s=0)
    # What no record names: started a moment before the supervisor died, or left by a dead procri.
    survivors += end(container_processes(folder), grace_s=0)
    survivors += end(marked(MARKER, str(folder.root)), grace_s=0)
    if namespaces:
        survivors += end(members(namespaces), grace_s=0)
    network.disconnect(folder.root)
    left = [ref for ref in survivors if ref.alive()]
    if left:
        pids = ", ".join(str(ref.pid) for ref in left)
        raise LocalError(f"processes of cluster {folder.name} do not end: {pids}")


def remove_files(folder: ClusterFolder) -> None:
    """Remove the cluster's folder; a mount that is still below it is undone first."""
    for point in mounts_below(folder.root):
        subprocess.run(["umount", "--lazy", str(point)], check=True, capture_output=True)
    if folder.root.exists():
        shutil.rmtree(folder.root)


def mounts_below(root: Path) -> list[Path]:
    """The mount points of this process's view at or below `root`, innermost first."""
    points = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        # Blanks and backslashes in a path are written as octal escapes.
        point = Path(line.split()[4].encode().decode("unicode_escape"))
        if point == root or root in point.parents:
            points.append(point)
    return sorted(points, key=lambda point: len(point.parts), reverse=True)


def container_processes(folder: ClusterFolder) -> list[ProcessRef]:
    """First processes of the containers that procri's records name and that are this cluster's.

    A record's pid may belong to another process by now: it counts only where the process lives
    in another mount namespace than this one, with the cluster's folder in its mount table.
    """
    found = []
    for record in container_records(folder):
        pid = record.get("pid") or 0
        ref = ProcessRef.of(pid) if pid > 0 else None
        if ref is not None and _is_container(ref, folder):
            found.append(ref)
    return found


def container_records(folder: ClusterFolder) -> Iterable[dict[str, Any]]:
    """procri's records of every node, one per container."""
    for path in sorted(folder.root.glob("n*/procri/containers/*.json")):
        try:
            yield json.loads(path.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            # Removed, or being written, at this moment.
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
