"""How memory of one GPU can be written by a process that uses another GPU of the same host.

The owner (a decode worker, say) allocates 1 GiB and hands it over a Unix socket; the writer (a
prefill worker) maps it and pushes KV into it. What separates the two processes grows from case to
case, up to what two pods of one GPU each have. It needs two GPUs, and root for the namespaces.

Every write is compared with what was sent, in memory that was overwritten before. Rates are medians
by device events, beside a plain peer copy of the same bytes by one process that sees both GPUs.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from tandem_bench.errors import CheckFailedError, MissingPackageError, NoGpuError, WorkloadError
from tandem_bench.gpu.device import require_gpu
from tandem_bench.options import argument, json_option
from tandem_bench.terminal import notes, results

PATIENCE_SECONDS: Final = 90.0

_UNSHARE: Final = ("unshare", "--mount", "--propagation", "private")
_PID: Final = ("--pid", "--fork", "--kill-child", "--mount-proc")
_ALL: Final = (*_UNSHARE, *_PID, "--net", "--ipc", "--uts")


@dataclass(frozen=True, slots=True)
class Case:
    """What separates owner and writer."""

    masked: bool = True
    """Each process has one GPU in its CUDA_VISIBLE_DEVICES."""
    prefix: tuple[str, ...] = ()
    """The command that starts each process in namespaces of its own."""
    hides: bool = False
    """The device files of other GPUs are hidden too."""


CASES: Final[dict[str, Case]] = {
    "both see both GPUs": Case(masked=False),
    "one visible GPU each": Case(),
    "and PID namespaces": Case(prefix=(*_UNSHARE, *_PID)),
    "and network namespaces": Case(prefix=(*_UNSHARE, "--net")),
    "and IPC namespaces": Case(prefix=(*_UNSHARE, "--ipc")),
    "all namespaces": Case(prefix=_ALL),
    "all, own device file only": Case(prefix=_ALL, hides=True),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a process can map and write another process's memory on another GPU of this host.

    It needs two GPUs, and root for the namespaces.
    """

    cases: tuple[str, ...] = argument(
        f"What separates the processes: {'; '.join(CASES)}. Default: each in turn.",
        metavar="[CASE]...",
        default=(),
    )
    json_file: Path | None = json_option()


def start(role: str, case: Case, folder: str, methods: Sequence[str]) -> "subprocess.Popen[str]":
    """The owner on the first GPU, or the writer on the second."""
    number = 0 if role == "owner" else 1
    environment = dict(os.environ)
    if case.masked:
        environment["CUDA_VISIBLE_DEVICES"] = "0" if case.hides else str(number)
    command = [*case.prefix, sys.executable, "-m", "tandem_bench.handoff.peer_sides"]
    command += ["--role", role, "--folder", folder]
    command += ["--device", "0" if case.masked else str(number), "--methods", *methods]
    if case.hides:
        command += ["--hide", str(number)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run_pair(case: Case, methods: Sequence[str]) -> list[dict[str, Any]]:
    """What the writer has found; fewer than all methods if a process has died."""
    with tempfile.TemporaryDirectory() as folder:
        owner = start("owner", case, folder, methods)
        assert owner.stdout is not None
        listening = owner.stdout.readline()
        output = errors = ""
        if listening:
            writer = start("writer", case, folder, methods)
            try:
                output, errors = writer.communicate(timeout=PATIENCE_SECONDS)
            except subprocess.TimeoutExpired:
                writer.kill()
                output, errors = writer.communicate()
        owner.kill()
        errors += owner.communicate()[1]
    found: list[dict[str, Any]] = [json.loads(line) for line in output.splitlines()]
    if len(found) < len(methods):
        last = [line for line in errors.splitlines() if line.strip()][-3:]
        found.append({"method": methods[len(found)], "error": " | ".join(last) or "no answer"})
    return found


def measure_ceilings() -> dict[str, float]:
    """Copies within one GPU and from one to the other, by one process that sees both; GB/s.

    Raises:
        CheckFailedError: the bytes came out changed.
        LinkError: a call of the driver failed.
    """
    import torch
    from cuda.bindings import driver

    from tandem_bench.handoff.peer_methods import SIZES, done, rate

    def copy_to_peer(*arguments: Any) -> None:
        done(driver.cuMemcpyPeerAsync(*arguments), "cuMemcpyPeerAsync")

    sides = [torch.empty(1 << 30, dtype=torch.uint8, device=f"cuda:{n}") for n in range(2)]
    sides[1].random_(0, 255)
    sides[0].copy_(sides[1])  # torch turns on the access of each to the other
    spare = torch.empty_like(sides[1])
    torch.cuda.set_device(1)
    stream = torch.cuda.current_stream().cuda_stream
    contexts = [done(driver.cuDevicePrimaryCtxRetain(n)) for n in range(2)]
    found = {"copy on one GPU, read and written": 2 * rate(1 << 30, lambda: spare.copy_(sides[1]))}
    for name, size in SIZES.items():
        pointers = (sides[0].data_ptr(), contexts[0], sides[1].data_ptr(), contexts[1])
        found[f"cuMemcpyPeer {name}"] = rate(size, partial(copy_to_peer, *pointers, size, stream))
    if not torch.equal(sides[0].cpu(), sides[1].cpu()):
        raise CheckFailedError("cuMemcpyPeer has changed the bytes")
    return found


def show(case: str, methods: Sequence[dict[str, Any]]) -> None:
    """Print a line per method."""
    for found in methods:
        rates = found.get("rates", {})
        told = found.get("error") or "; ".join(f"{name} {gb:.1f}" for name, gb in rates.items())
        line = f"{case} | {found['method']} | {found.get('torch', '')} | {told}"
        results.print(line, soft_wrap=True, markup=False)


def require_two_gpus() -> None:
    """Raise NoGpuError or MissingPackageError, with what to do, where this can't be measured."""
    require_gpu()
    import torch

    if torch.cuda.device_count() < 2:
        raise NoGpuError(
            "`peer-memory` needs two GPUs, and torch sees one",
            "run this on a machine with two, both of them in CUDA_VISIBLE_DEVICES",
        )
    if (
        importlib.util.find_spec("cuda") is None
        or importlib.util.find_spec("cuda.bindings") is None
    ):
        raise MissingPackageError(
            "`peer-memory` needs cuda.bindings, which is not installed",
            "pip install cuda-bindings, of the CUDA version that torch has",
        )


def run(options: Options) -> None:
    """The ceilings, then every method of sharing in every case."""
    chosen = options.cases or tuple(CASES)
    if unknown := [name for name in chosen if name not in CASES]:
        raise WorkloadError(
            f"there is no case called {unknown[0]!r}", f"choose from {'; '.join(CASES)}"
        )
    require_two_gpus()
    from tandem_bench.handoff.peer_methods import METHODS

    ceilings = measure_ceilings()
    line = "; ".join(f"{name} {value:.1f} GB/s" for name, value in ceilings.items())
    results.print(line, soft_wrap=True, markup=False)
    measured: dict[str, list[dict[str, Any]]] = {}
    for name in chosen:
        found: list[dict[str, Any]] = []
        while len(found) < len(METHODS):
            found += run_pair(CASES[name], list(METHODS)[len(found) :])
        measured[name] = found
        show(name, found)
    if options.json_file is not None:
        document = {"ceilings": ceilings, "cases": measured}
        options.json_file.write_text(json.dumps(document, indent=1) + "\n")
        notes.print(f"wrote {options.json_file}")
