"""What every search for a configuration needs: processes that compile, and the device's file."""

import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import resources
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import triton

from tandem_bench.errors import WorkloadError
from tandem_bench.gpu.lines import Line, LineTable, best_of
from tandem_bench.kernels.gemm import GemmShape
from tandem_kernels.tuning import device_file

Job = TypeVar("Job")
Found = TypeVar("Found")


def in_processes(
    work: Callable[[Job], Found],
    jobs: Sequence[Job],
    num_processes: int,
    *,
    start: Literal["spawn", "fork"] = "spawn",
    tasks_each: int | None = None,
) -> list[Found]:
    """Results of `work` in processes of their own, which fill Triton's cache on disk.

    `tasks_each` of 1 gives every job a new process, for a wrong kernel can end it.
    """
    context = get_context(start)
    with ProcessPoolExecutor(num_processes, context, max_tasks_per_child=tasks_each) as pool:
        return list(pool.map(work, jobs))


def keep_best(table: LineTable, stage: str, lines: Iterable[Line]) -> Line:
    """Keep all lines, show the fastest and return it."""
    found = list(lines)
    best = best_of(found)
    for line in found:
        table.keep(stage, line, shown=line is best)
    return best


def parse_shape(text: str) -> GemmShape:
    """`4608x3584`, or `37888x3584:gate`, whose rows count both halves. Raises WorkloadError."""
    sizes, _, gate = text.partition(":")
    try:
        columns, size = map(int, sizes.split("x"))
    except ValueError:
        raise WorkloadError(
            f"{text!r} is not the shape of a weight", "write ROWSxCOLUMNS or ROWSxCOLUMNS:gate"
        ) from None
    return GemmShape(text, columns, size, gate == "gate")


class TunedFile:
    """The package's JSON file of this device, changed entry by entry."""

    def __init__(self, device: str) -> None:
        self._path = Path(str(resources.files("tandem_kernels"))) / "tuned" / device_file(device)
        self._table: dict[str, Any] = {}
        if self._path.exists():
            self._table = json.loads(self._path.read_text())
        self._device = device

    def name_versions(self) -> None:
        """Say which device and versions the entries are from."""
        versions = {"triton": triton.__version__, "torch": torch.__version__}
        self._table |= {"device": self._device, **versions}

    def put(self, section: str, name: str, entry: dict[str, Any]) -> None:
        """Replace one entry and write the file."""
        self._table.setdefault(section, {})[name] = entry
        self._path.write_text(show_table(self._table) + "\n")

    def merge(self, section: str, name: str, entry: dict[str, Any]) -> None:
        """Put some numbers of rows beside an entry's others, in order, and write the file."""
        merged = self._table.get(section, {}).get(name, {}) | entry
        self.put(section, name, {rows: merged[rows] for rows in sorted(merged, key=int)})


def show_table(table: dict[str, Any], indent: str = "") -> str:
    """JSON in which every object that holds no other is on one line."""
    if not any(isinstance(value, dict) for value in table.values()):
        return json.dumps(table)
    inner = indent + "  "
    lines = [
        f"{inner}{json.dumps(key)}: "
        + (show_table(value, inner) if isinstance(value, dict) else json.dumps(value))
        for key, value in table.items()
    ]
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
