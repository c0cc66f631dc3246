"""What the machine must have: Linux, root, and a handful of commands."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tandem_local.errors import RequirementError, RootRequired
from tandem_local.progress import Progress, ProgressEvent

# Each command, and the Debian package that contains it.
COMMANDS = {
    "ip": "iproute2",
    "nft": "nftables",
    "nsenter": "util-linux",
    "unshare": "util-linux",
    "mount": "mount",
}
ADMIN_PATH = "/usr/local/sbin:/usr/sbin:/sbin"


def check_machine(progress: Progress) -> None:
    """Raise RequirementError if the embedded cluster cannot run on this machine.

    Where apt-get exists, missing commands are installed, and `progress` says so.
    """
    if sys.platform != "linux":
        raise RequirementError(
            f"the embedded cluster needs Linux, and this is {sys.platform}: name an existing "
            "cluster with --kubeconfig FILE, or run `tandem serve MODEL`, without Kubernetes"
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
            f"the embedded cluster needs commands that PATH lacks: {', '.join(missing)}. "
            f"Install them, for example with `apt-get install {' '.join(packages)}` or "
            f"`dnf install {' '.join(packages)}`"
        )


def missing_commands() -> list[str]:
    """The commands that are neither in PATH nor in the administrator's folders."""
    path = f"{os.environ.get('PATH', os.defpath)}:{ADMIN_PATH}"
    return [command for command in COMMANDS if shutil.which(command, path=path) is None]


def _apt_install(packages: list[str]) -> None:
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "--yes", "--no-install-recommends", *packages]
    # A fresh container image has no package lists, and stale lists name files that are gone.
    has_lists = any(Path("/var/lib/apt/lists").glob("*_Packages*"))
    if has_lists and not _failure(install, environment):
        return
    for command in (["apt-get", "update"], install):
        failure = _failure(command, environment)
        if failure:
            raise RequirementError(
                f"{' and '.join(packages)} could not be installed: `{' '.join(command)}` failed:\n"
                f"{failure[-2000:]}\nInstall them by hand and try again."
            )


def _failure(command: list[str], environment: dict[str, str]) -> str:
    """What a command complained about; empty if it succeeded."""
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    return "" if done.returncode == 0 else done.stderr.strip() or f"status {done.returncode}"
