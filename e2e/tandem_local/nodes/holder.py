"""A node: a network and a mount namespace, held by one idle process, the *holder*.

Neither namespace has a name on the host. When the processes that live in a node are gone, so are
its network, its mounts and its firewall rules: nothing can be left behind.

A node sees the machine's own file system, with four differences that no one else sees: the folders
that every kubelet writes to are its own; the kernel settings that a kubelet would change for the
whole machine already look as it wants them; its network settings are its own, with forwarding on;
and folders that only root may enter can be entered, because pods run as other users too.
"""

from __future__ import annotations

import os
import shlex
import stat
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tandem_local.errors import StartError
from tandem_local.machine.process import ProcessRef
from tandem_local.spec import ImageEntry

# The kubelet uses these paths whatever --root-dir says. Each node sees an empty folder of its own
# there, so that two kubelets on one machine do not interfere.
PRIVATE_FOLDERS = ("/var/lib/kubelet", "/var/log/containers")
KUBELET_TUNABLES = {
    "/proc/sys/vm/overcommit_memory": "1",
    "/proc/sys/vm/panic_on_oom": "0",
    "/proc/sys/kernel/panic": "10",
    "/proc/sys/kernel/panic_on_oops": "1",
    "/proc/sys/kernel/keys/root_maxkeys": "1000000",
    "/proc/sys/kernel/keys/root_maxbytes": "25000000",
}
NODE_SYSCTLS = {
    "net/ipv4/ip_forward": "1",
    "net/ipv4/conf/all/rp_filter": "0",
    "net/ipv4/conf/default/rp_filter": "0",
    "net/ipv4/conf/all/send_redirects": "0",
    "net/ipv4/conf/default/send_redirects": "0",
}
# A folder's mode and entries cannot be changed in one namespace only. What works is an empty file
# system mounted over it, with the folder's own entries bound back one by one.
REFILL = """\
refill() {
  stage=$(mktemp -d)
  mount --rbind "$1" "$stage"
  mount -t tmpfs -o "mode=$2" tandem "$1"
  for entry in "$stage"/* "$stage"/.[!.]*; do
    name="$1/${entry##*/}"
    if test -L "$entry"; then cp -P "$entry" "$name"
    elif test -d "$entry"; then mkdir "$name"; mount --rbind "$entry" "$name"
    elif test -e "$entry"; then : > "$name"; mount --bind "$entry" "$name"; fi
  done
  umount -l "$stage"
  rmdir "$stage"
}"""
START_TIMEOUT_S = 30.0


def enter(holder: int) -> list[str]:
    """The prefix of a command that runs inside the node; it execs, so the pid is the command's."""
    # Not `ip netns exec`, which mounts a fresh /sys that hides /sys/fs/cgroup.
    return ["nsenter", f"--target={holder}", "--net", "--mount", "--"]


def needed_paths(images: Iterable[ImageEntry]) -> list[Path]:
    """What a container reads: this interpreter, and the images' entry points and folders."""
    paths = {Path(sys.prefix), Path(sys.base_prefix), Path(sys.executable).resolve()}
    # Editable installs lie where the sources are.
    paths |= {Path(entry) for entry in sys.path if entry}
    for image in images:
        named = [*image.entrypoint[:1], *image.env.values(), *image.files]
        paths |= {Path(part) for value in named for part in value.split(":")}
    return sorted(path for path in paths if path.is_absolute())


def closed_folders(paths: Iterable[Path]) -> list[Path]:
    """The folders on the way to `paths` that not every user may enter, outermost first."""
    closed = set()
    for path in paths:
        for folder in (path, *path.parents):
            if folder.is_dir() and not folder.stat().st_mode & stat.S_IXOTH:
                closed.add(folder)
    return sorted(closed, key=lambda folder: (len(folder.parts), folder))


def holder_script(folder: Path, closed: Sequence[Path]) -> str:
    """The script of a holder: it sets up the node's view of the machine, and then idles."""
    lines = [REFILL]
    # They can be entered but not listed; what lies inside keeps its own mode.
    lines += [f"refill {shlex.quote(str(path))} 0711" for path in closed]
    lines += [_mask(Path(path)) for path in PRIVATE_FOLDERS]
    tunables = folder / "tunables"
    for path, value in KUBELET_TUNABLES.items():
        stand_in = shlex.quote(str(tunables / path.removeprefix("/proc/sys/").replace("/", ".")))
        lines.append(
            f"if test -e {path}; then echo {value} > {stand_in}; mount --bind {stand_in} {path}; fi"
        )
    for path, value in NODE_SYSCTLS.items():
        lines.append(f"echo {value} > /proc/sys/{path}")
    lines.append(f"echo ready > {shlex.quote(str(folder / 'holder.ready'))}")
    lines.append("exec sleep infinity")
    return "\n".join(lines)


def start_holder(
    folder: Path, closed: Sequence[Path], environment: Mapping[str, str], log: Path
) -> ProcessRef:
    """Start the process that holds a node's namespaces, and wait until they are set up.

    Raises StartError if the process ends, or takes too long.
    """
    (folder / "tunables").mkdir(parents=True, exist_ok=True)
    ready = folder / "holder.ready"
    ready.unlink(missing_ok=True)
    # `slave`: a later unmount on the host takes effect here, and no mount made here reaches it.
    argv = ["unshare", "--net", "--mount", "--propagation=slave", "sh", "-euc"]
    with log.open("ab") as output:
        child = subprocess.Popen(
            [*argv, holder_script(folder, closed)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=dict(environment),
            start_new_session=True,
            cwd="/",
        )
    deadline = time.monotonic() + START_TIMEOUT_S
    while not ready.exists():
        if child.poll() is not None or time.monotonic() > deadline:
            detail = log.read_text(errors="replace").strip()[-2000:]
            raise StartError(f"a node's namespaces could not be created; {log} ends:\n{detail}")
        time.sleep(0.01)
    ref = ProcessRef.of(child.pid)
    if ref is None:
        raise StartError(f"the process that holds a node's namespaces died at once: see {log}")
    return ref


def _mask(path: Path) -> str:
    """Shell lines that give the node an empty folder at `path` without touching the host."""
    missing = path
    while not missing.parent.exists():
        missing = missing.parent
    target = shlex.quote(os.fspath(path))
    if missing.exists():
        return f"mount -t tmpfs -o mode=0755 tandem {target}"
    return f"refill {shlex.quote(os.fspath(missing.parent))} 0755\nmkdir -p {target}"
