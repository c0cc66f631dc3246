"""Where the start of a warm worker goes: seconds and CPU seconds by stage.

    python engine/benchmarks/worker_startup.py [--model URI] [--rounds 3]

Starts `tandem-worker` as a process, reads its log, and asks /proc for the CPU time of the server
and of its core at every stage. The first round is not counted: it converts weights if need be.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tandem_engine.tests.real_gemma import MODEL

TICKS = os.sysconf("SC_CLK_TCK")
STAGES = {
    "server: Python, imports, ports": "starting",
    "core: Python, imports": "importing",
    "core: the runner's module, files": "torch",
    "core: import torch": "weights",
    "core: map weights, make the KV cache": "listening",
}
"""A stage's name, and the event that ends it."""


def cpu_seconds(pid: int) -> float:
    """User and system time of a process and of its children that run."""
    total = 0.0
    with contextlib.suppress(FileNotFoundError):
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        total = (int(fields[11]) + int(fields[12])) / TICKS
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += sum(
                cpu_seconds(int(child)) for child in (task / "children").read_text().split()
            )
    return total


def events(process: "subprocess.Popen[str]") -> Iterator[str]:
    """Names of what the worker says: its loading stages, "starting" and "listening"."""
    assert process.stdout is not None
    for line in process.stdout:
        with contextlib.suppress(ValueError):
            said: dict[str, Any] = json.loads(line)
            yield str(said["stage"] if said["event"] == "loading" else said["event"])


def start_once(model: str) -> dict[str, tuple[float, float]]:
    """Wall and CPU seconds by stage, and in all."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "tandem_engine.main", "--model", model, "--host", "127.0.0.1"),
            *("--http-port", "0", "--wire-port", "0", "--bootstrap-port", "0"),
            *("--kv-memory", "512Mi"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    reached: dict[str, tuple[float, float]] = {}
    try:
        for event in events(process):
            now = time.perf_counter() - began
            reached.setdefault(event, (now, cpu_seconds(process.pid)))
            if event == "listening":
                break
    finally:
        process.kill()
        process.wait()
    found, before = {}, (0.0, 0.0)
    for stage, event in STAGES.items():
        at = reached[event]
        found[stage] = (at[0] - before[0], at[1] - before[1])
        before = at
    return found | {"all": reached["listening"]}


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    rounds = [start_once(arguments.model) for _ in range(arguments.rounds + 1)][1:]
    print(f"load {os.getloadavg()[0]:.1f}, {os.cpu_count()} CPUs; medians of {len(rounds)} rounds")
    for stage in rounds[0]:
        wall, cpu = (statistics.median(one[stage][kind] for one in rounds) for kind in (0, 1))
        print(f"{stage:36} {wall:6.2f} s   CPU {cpu:5.2f} s")


if __name__ == "__main__":
    main()
