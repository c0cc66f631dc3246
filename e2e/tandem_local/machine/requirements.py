"""What the machine must have: Linux, root, and a handful of commands."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tandem_local.errors import RequirementError, RootRequired
from tandem_local.progress import Progress, ProgressEvent

# Command and the Debian package that has it.
COMMANDS = {
    "ip": "iproute2",
    "nft": "nftables",
    "nsenter": "util-linux",
    "unshare": "util-linux",
    "mount": "mount",
}
ADMIN_PATH = "/usr/local/sbin:/usr/sbin:/sbin"


def check_machine(progress: Progress) -> None:
    """Raise RequirementError where the embedded cluster cannot run here.

    On Debian and its kin missing commands are installed, with a line that says so.
    """
    if sys.platform != "linux":
        raise RequirementError(
            "the embedded cluster needs Linux; name an existing cluster with --kubeconfig, "
            "or run `tandem serve MODEL`"
        )
    if os.geteuid() != 0:
        raise RootRequired
    missing = missing_commands()
    if not missing:
        return
    packages = sorted({COMMANDS[command] for command in missing})
    if shutil.which("apt-get"):
        progress(ProgressEvent("requirements", f"apt-get install {' '.join(packages)}"))
        _apt_install(packages)
        missing = missing_commands()
    if missing:
        raise RequirementError(
            f"missing: {', '.join(missing)}. Install them, e.g. "
            f"`apt-get install {' '.join(packages)}` or "
            f"`dnf install {' '.join(packages)}`"
        )


def missing_commands() -> list[str]:
    """The commands that are not in PATH, the administrator's folders included."""
    path = f"{os.environ.get('PATH', os.defpath)}:{ADMIN_PATH}"
    return [command for command in COMMANDS if shutil.which(command, path=path) is None]


def _apt_install(packages: list[str]) -> None:
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "--yes", "--no-install-recommends", *packages]
    # A fresh container image has no package lists, and old lists name files that are gone.
    has_lists = any(Path("/var/lib/apt/lists").glob("*_Packages*"))
    if has_lists and not _failure(install, environment):
        return
    for command in (["apt-get", "update"], install):
        failure = _failure(command, environment)
        if failure:
            raise RequirementError(f"`{' '.join(command)}` failed:\n{failure[-2000:]}")


def _failure(command: list[str], environment: dict[str, str]) -> str:
    """What a command complained of; empty when it did its work."""
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    return "" if done.returncode == 0 else done.stderr.strip() or f"status {done.returncode}"
