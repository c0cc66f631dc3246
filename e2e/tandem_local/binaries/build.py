"""Builds the cluster's binaries from `e2e/cluster`, once per version of its sources.

The result is kept in the per-user cache under a key made from every source file and the Go version,
so the build is repeated exactly when something that goes into it has changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tandem_local.binaries.toolchain import (
    GO_DOWNLOADS,
    find_go,
    go_version,
    required_version,
)
from tandem_local.errors import BuildError
from tandem_local.folders import cache_dir, locked
from tandem_local.progress import Progress, ProgressEvent, silent

CLUSTER_OVERRIDE = "TANDEM_CLUSTER_BINARY"
COREDNS_OVERRIDE = "TANDEM_COREDNS_BINARY"
SOURCE_NAMES = ("go.mod", "go.sum")
# Roughly how long a cold build takes; said before it starts.
COLD_BUILD = "about seven minutes on two cores, once"
PROXY_REMEDY = "\nIf this machine cannot reach the Go module proxy, set GOPROXY to one that it can."


@dataclass(frozen=True)
class Binaries:
    """The paths of the two binaries that a cluster runs on."""

    cluster: Path
    """The multi-call binary: etcd, the Kubernetes components, kubectl, helm and procri."""
    coredns: Path
    """CoreDNS."""

    def to_json(self) -> str:
        """Both paths as JSON."""
        return json.dumps({"cluster": str(self.cluster), "coredns": str(self.coredns)})

    @classmethod
    def from_json(cls, text: str) -> Binaries:
        """The inverse of `to_json`."""
        data = json.loads(text)
        return cls(Path(data["cluster"]), Path(data["coredns"]))


def find_binaries(progress: Progress = silent) -> Binaries:
    """The binaries to run: those that the environment names, or else ones built here (or cached).

    Raises BuildError if the sources are missing or the build fails.
    """
    named = os.environ.get(CLUSTER_OVERRIDE), os.environ.get(COREDNS_OVERRIDE)
    if named[0] and named[1]:
        for variable, value in zip((CLUSTER_OVERRIDE, COREDNS_OVERRIDE), named, strict=True):
            if not os.access(value or "", os.X_OK):
                raise BuildError(
                    f"{variable} is {value}, which is not an executable file: "
                    "correct the path, or unset the variable to have the binary built"
                )
        return Binaries(Path(named[0]).absolute(), Path(named[1]).absolute())
    built = build(source_dir(), progress)
    return Binaries(
        Path(named[0]).absolute() if named[0] else built.cluster,
        Path(named[1]).absolute() if named[1] else built.coredns,
    )


def source_dir() -> Path:
    """The Go sources, which lie beside this package.

    Raises BuildError if this package was installed without them.
    """
    folder = Path(__file__).resolve().parents[2] / "cluster"
    if not (folder / "go.mod").is_file():
        raise BuildError(
            f"the Go sources of the embedded cluster are not at {folder}: a wheel does not "
            "contain them.\nInstall from a clone of the repository (`make install`), or set "
            f"{CLUSTER_OVERRIDE} and {COREDNS_OVERRIDE} to binaries built from one."
        )
    return folder


def build(sources: Path, progress: Progress = silent) -> Binaries:
    """Build both binaries into the cache, unless they are there already."""
    go = find_go(required_version(sources / "go.mod"))
    version = go_version(go)
    if version is None:
        raise BuildError(
            f"`{go} env GOVERSION` fails: repair this Go, or install another from {GO_DOWNLOADS}"
        )
    target = cache_dir() / "bin" / source_key(sources, version)
    binaries = Binaries(target / "tandem-cluster", target / "coredns")
    if binaries.cluster.exists() and binaries.coredns.exists():
        return binaries
    with locked(cache_dir() / "bin" / ".lock"):
        target.mkdir(parents=True, exist_ok=True)
        for binary, module in (
            (binaries.cluster, sources),
            (binaries.coredns, sources / "coredns"),
        ):
            if not binary.exists():
                _build_module(go, module, binary, progress)
    return binaries


def source_key(sources: Path, version: Sequence[int]) -> str:
    """A hash of every Go source except tests, of the module files, and of the Go version."""
    digest = hashlib.sha256(".".join(map(str, version)).encode())
    for path in sorted(sources.rglob("*")):
        is_source = path.suffix == ".go" and not path.name.endswith("_test.go")
        if path.is_file() and (is_source or path.name in SOURCE_NAMES):
            digest.update(b"\0" + path.relative_to(sources).as_posix().encode() + b"\0")
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:20]


def linker_flags(go_mod: str) -> str:
    """The `-ldflags` that tell the binary which versions of Kubernetes and Helm it contains.

    Without them every component reports `v0.0.0-master`, which a chart's `kubeVersion` refuses.
    """
    flags = ["-s", "-w"]
    kubernetes = re.search(r"^\s*k8s\.io/kubernetes (v(\d+)\.(\d+)\S*)", go_mod, re.MULTILINE)
    if kubernetes:
        values = {
            "gitVersion": kubernetes[1],
            "gitMajor": kubernetes[2],
            "gitMinor": kubernetes[3],
            "gitTreeState": "clean",
            "gitCommit": "unknown",
            "buildDate": "1970-01-01T00:00:00Z",
        }
        for package in ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version"):
            flags += [f"-X {package}.{name}={value}" for name, value in values.items()]
    helm = re.search(r"^\s*helm\.sh/helm/v4 (v\S+)", go_mod, re.MULTILINE)
    if helm:
        flags.append(f"-X helm.sh/helm/v4/internal/version.version={helm[1]}")
    return " ".join(flags)


def _build_module(go: Path, module: Path, binary: Path, progress: Progress) -> None:
    name = binary.name
    environment = os.environ | {
        "CGO_ENABLED": "0",
        "GOFLAGS": "-buildvcs=false",
        "GOWORK": "off",
        "PATH": f"{go.parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    progress(ProgressEvent("download", f"fetching the modules of {name}"))
    _go(
        go,
        ["mod", "download", "-x"],
        module,
        environment,
        "download",
        f"modules of {name}",
        progress,
    )
    total = _count_packages(go, module, environment)
    progress(ProgressEvent("build", f"compiling {name} ({COLD_BUILD})", 0, total))
    with tempfile.TemporaryDirectory(dir=binary.parent) as scratch:
        fresh = Path(scratch) / name
        flags = linker_flags((module / "go.mod").read_text())
        _go(
            go,
            ["build", "-v", "-trimpath", "-ldflags", flags, "-o", str(fresh), "."],
            module,
            environment,
            "build",
            f"compiling {name}",
            progress,
            total,
        )
        os.replace(fresh, binary)
    progress(ProgressEvent("build", f"{name} is built", total, total))


def _count_packages(go: Path, module: Path, environment: dict[str, str]) -> int | None:
    done = subprocess.run(
        [str(go), "list", "-deps", "-f", "{{.ImportPath}}", "."],
        cwd=module,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return len(done.stdout.splitlines()) if done.returncode == 0 else None


def _go(
    go: Path,
    arguments: Sequence[str],
    module: Path,
    environment: dict[str, str],
    stage: str,
    message: str,
    progress: Progress,
    total: int | None = None,
) -> None:
    """Run a Go command and report each line of its output as one unit done.

    Go does not name the packages that it has cached, so a warm build ends before `total`.
    """
    # The build takes minutes, and the machine must stay usable.
    nice = ["nice"] if shutil.which("nice") else []
    with subprocess.Popen(
        [*nice, str(go), *arguments],
        cwd=module,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    ) as child:
        lines: list[str] = []
        assert child.stderr is not None, "stderr is a pipe"
        try:
            for line in child.stderr:
                lines.append(line.rstrip())
                progress(ProgressEvent(stage, message, len(lines), total))
        except BaseException:
            # Neither Ctrl-C nor a failing progress callback may leave a compiler running.
            child.kill()
            raise
    if child.returncode != 0:
        tail = "\n".join(lines[-20:])
        remedy = PROXY_REMEDY if stage == "download" else ""
        raise BuildError(f"`go {' '.join(arguments[:2])}` failed in {module}:\n{tail}{remedy}")
