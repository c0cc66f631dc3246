"""`tandem bench kernels` and `tandem bench step`: lines of value, floor and percent."""

import json
import tempfile
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tandem_bench.gpu import require_gpu
from tandem_bench.kernel_suite import choose_stages
from tandem_bench.shapes import model_uri
from tandem_bench.step_suite import (
    decode_lines,
    parse_pairs,
    prefill_lines,
    read_config,
    shape_fields,
)
from tandem_cli.bench_failure import told
from tandem_cli.console import console, results, show_steps
from tandem_cli.errors import CliError
from tandem_engine.errors import TandemEngineError
from tandem_engine.startup import Startup, process_start
from tandem_wire.model_error import ModelSourceError

if TYPE_CHECKING:
    from tandem_kernels.bench.timing import Ceilings, Line


class LineTable:
    """Prints lines as they come, keeps them for the file, and continues after a wrong result."""

    def __init__(self) -> None:
        self.lines: list[dict[str, object]] = []
        self.failed: list[str] = []

    def take(self, stage: str, lines: Iterable["Line"]) -> None:
        """All lines of one stage."""
        from tandem_kernels.bench.timing import WrongResultError

        results.print(f"[bold]{stage}[/]")
        try:
            for line in lines:
                results.print(show_line(line), soft_wrap=True)
                self.lines.append({"stage": stage, **line.to_json()})
        except WrongResultError as error:
            self.failed.append(f"{stage}: {error}")
            results.print(f"[red]wrong result[/] {error}", soft_wrap=True)

    def finish(self, ceilings: "Ceilings", config: dict[str, Any], json_file: Path | None) -> None:
        """Write the file. Raises CliError when something was wrong."""
        if json_file is not None:
            import torch
            import triton

            document = {
                "schema": "tandem-bench-kernels/1",
                "measured": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
                "device": ceilings.device,
                "copy_bytes_per_second": ceilings.copy,
                "matmul_per_second": ceilings.matmul,
                "torch": torch.__version__,
                "triton": triton.__version__,
                "config": config,
                "lines": self.lines,
                "failed": self.failed,
            }
            json_file.write_text(json.dumps(document, indent=1) + "\n")
            console.print(f"wrote {json_file}")
        if self.failed:
            raise CliError(
                "; ".join(self.failed),
                "no time is reported for a kernel with a wrong result: fix the kernel first",
            )


def show_line(line: "Line") -> str:
    """Value, floor, percent, and what was run."""
    percent = line.percent
    style = "green" if percent >= 85 else "yellow" if percent >= 60 else "red"
    note = line.note.replace("[", "\\[")
    return (
        f"  {line.name:42s} {line.seconds * 1e6:11,.1f} µs  floor {line.floor * 1e6:11,.1f} µs  "
        f"[{style}]{percent:5.1f} %[/]  [dim]error {line.error:.1e}  {note}[/]"
    )


def measure_kernels(only: str, json_file: Path | None) -> None:
    """Every chosen stage."""
    with told():
        stages = choose_stages(only)
        ceilings = find_ceilings()
    table = LineTable()
    for name, stage in stages.items():
        table.take(name, stage(ceilings))
    table.finish(ceilings, {"only": only}, json_file)


def measure_step(
    model: str, cases: str, prefill_cases: str, prefill: bool, engine: bool, json_file: Path | None
) -> None:
    """Decode steps, then prefills."""
    with told():
        decode_cases = parse_pairs(cases)
        prompts = parse_pairs(prefill_cases) if prefill else []
        try:
            fields = shape_fields(read_config(model))
        except ModelSourceError as error:
            raise CliError(str(error), error.remedy) from error
        ceilings = find_ceilings()
    table = LineTable()
    if fields is None or engine:
        measure_engine(table, model, decode_cases, prompts, ceilings)
    else:
        from tandem_kernels.bench.step import Shape

        shape = Shape(**fields)
        table.take(f"decode, {model}", decode_lines(shape, decode_cases, ceilings))
        if prompts:
            table.take(f"prefill, {model}", prefill_lines(shape, prompts, ceilings))
    table.finish(ceilings, {"model": model, "engine": engine, **(fields or {})}, json_file)


def measure_engine(
    table: LineTable,
    model: str,
    decode_cases: list[tuple[int, int]],
    prompts: list[tuple[int, int]],
    ceilings: "Ceilings",
) -> None:
    """Steps of the engine's runner; cases for whose KV the GPU is too small are left out."""
    from tandem_bench.engine_steps import STEPS, EngineSteps, open_runner

    longest = max(
        size + STEPS + 1 for size in [c for _, c in decode_cases] + [p for p, _ in prompts]
    )
    budget = max([chunk for _, chunk in prompts], default=2048)
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as folder, told(), show_steps() as bar:
        try:
            startup = Startup(bar.update, process_start())
            uri = model_uri(model, Path(folder))
            most = max(batch for batch, _ in decode_cases)
            runner = open_runner(uri, longest, budget, most, startup)
        except (TandemEngineError, ModelSourceError) as error:
            raise CliError(str(error), getattr(error, "remedy", "")) from error
    console.print(startup.report().describe(), soft_wrap=True)
    steps = EngineSteps(runner, ceilings)
    try:
        fitting = [case for case in decode_cases if steps.fits(*case)]
        for batch, context in decode_cases:
            if (batch, context) not in fitting:
                results.print(f"[dim]{batch} x {context}: not enough memory for its KV[/]")
        table.take(f"decode, {model}, engine", steps.decode_lines(fitting))
        table.take(f"prefill, {model}, engine", steps.prefill_lines(prompts))
    finally:
        runner.close()


def find_ceilings() -> "Ceilings":
    """Measure the rates of this GPU and print them. Raises NoGpuError."""
    require_gpu()
    import torch

    from tandem_kernels.bench.timing import measure_ceilings

    torch.manual_seed(0)
    ceilings = measure_ceilings()
    results.print(
        f"{ceilings.device}: copy {ceilings.copy / 1e12:.3f} TB/s, "
        f"matmul {ceilings.matmul / 1e12:.0f} TFLOP/s, torch {torch.__version__}"
    )
    return ceilings
