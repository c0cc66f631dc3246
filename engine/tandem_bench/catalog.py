"""Every benchmark by its name: what `tandem bench` and `python -m tandem_bench` offer.

A benchmark is a module with `Options` (see `tandem_bench.options`) and `run(options)`. It is
imported when its command is called, so that one without torch runs where torch isn't installed.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final

import typer
from typer.core import TyperGroup
from typer.main import get_command

from tandem_bench.errors import BenchError, EngineError, MissingPackageError
from tandem_bench.options import REST_SETTINGS, build_command, takes_rest
from tandem_bench.terminal import notes


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A command: its name, where it is, and one line about it."""

    name: str
    module: str
    says: str

    @property
    def panel(self) -> str:
        """The heading under which `--help` lists it."""
        return PANELS[self.module.partition(".")[0]]


PANELS: Final = {
    "serve": "Any endpoint",
    "offline": "The engine",
    "engine": "The engine",
    "handoff": "Parts of a fleet",
    "soak": "Parts of a fleet",
    "router": "Parts of a fleet",
    "kernels": "Kernels",
    "tune": "Kernels",
    "shapes": "Any endpoint",
}
"""By room."""

BENCHMARKS: Final = (
    Benchmark("serve", "serve.command", "Load any OpenAI endpoint: TTFT, every gap, goodput."),
    Benchmark("compare", "serve.compare", "Endpoints side by side under the same arrivals."),
    Benchmark("longest-gap", "serve.longest_gap", "Gaps of streams while a long prompt arrives."),
    Benchmark("same-tokens", "serve.same_tokens", "Compare two endpoints' answers by token."),
    Benchmark("shape", "shapes", "Write a model's folder (config, tokenizer) to serve a shape."),
    Benchmark("offline", "offline.command", "The engine in this process, without HTTP."),
    Benchmark("step", "engine.step", "A whole decode step and prefill against the floor."),
    Benchmark("tensor-parallel", "engine.tensor_parallel", "One shape on 1, 2 or more GPUs."),
    Benchmark("startup", "engine.startup", "Where the start of a worker goes, by stage."),
    Benchmark("weights", "engine.weights", "How fast weights come onto a device."),
    Benchmark("agreement", "engine.agreement", "How often Gemma picks the reference's token."),
    Benchmark(
        "against-transformers",
        "engine.against_transformers",
        "The engine and transformers in one run, on the CPU.",
    ),
    Benchmark("handoff", "handoff.loopback", "KV from worker to worker on this machine's CPU."),
    Benchmark("handoff-gpu", "handoff.gpu", "KV from one GPU worker's cache to another's."),
    Benchmark("peer-memory", "handoff.peer_memory", "What processes can map of each other's GPU."),
    Benchmark("soak", "soak.command", "Requests through a fleet that fails all the time."),
    Benchmark("router", "router.overhead", "What a router adds per request and per token."),
    Benchmark("kernels", "kernels.suite", "Every kernel against the floor of this GPU."),
    Benchmark("tune", "tune.sweep", "Try every configuration of every kernel."),
    Benchmark("tune-linear", "tune.linear", "Tune the linear kernels for further shapes."),
    Benchmark("tune-moe", "tune.moe", "Tune the mixture of experts."),
    Benchmark("tune-hopper", "tune.hopper", "Tune the Gluon product on Hopper."),
    Benchmark("tune-step", "tune.step", "Choose products and splits by a whole decode step."),
)

Guard = Callable[[], AbstractContextManager[None]]
"""Made around every run; decides what becomes of a BenchError."""


def load_command(benchmark: Benchmark, guard: Guard) -> Any:
    """The click command of a benchmark, with its options."""
    try:
        module = import_module(f"tandem_bench.{benchmark.module}")
    except ModuleNotFoundError as error:
        with guard():
            raise MissingPackageError(
                f"`{benchmark.name}` needs {error.name}, which is not installed",
                "pip install 'tandem-inference[engine,gpu]', or run in a checkout with its extras",
            ) from error

    def run(options: Any) -> None:
        with guard(), _as_bench_errors():
            module.run(options)

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    settings = REST_SETTINGS if takes_rest(module.Options) else {}
    app.command(benchmark.name, context_settings=settings)(build_command(module.Options, run))
    return get_command(app)


def build_app(guard: Guard) -> typer.Typer:
    """All benchmarks as the subcommands of one application."""

    class Group(TyperGroup):
        """Lists one line per benchmark; imports the one that is called."""

        def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
            name, listed, remaining = super().resolve_command(ctx, args)
            found = next((each for each in BENCHMARKS if each.name == name), None)
            return name, load_command(found, guard) if found else listed, remaining

    app = typer.Typer(
        cls=Group,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode="markdown",
        pretty_exceptions_enable=False,
        help="Measure kernels, steps, hand-off, router, the engine, or any OpenAI endpoint.",
    )
    for benchmark in BENCHMARKS:
        listed = app.command(benchmark.name, help=benchmark.says, rich_help_panel=benchmark.panel)
        listed(_not_called)
    return app


def _not_called() -> None:
    raise AssertionError("the group loads the command that is called")


@contextmanager
def _as_bench_errors() -> Iterator[None]:
    """What the engine refuses becomes an error of the benchmark, with what to do."""
    from tandem_engine.errors import TandemEngineError
    from tandem_wire.model_error import ModelSourceError

    try:
        yield
    except (TandemEngineError, ModelSourceError) as error:
        remedy = getattr(error, "remedy", "") or "see `tandem-worker --help`"
        raise EngineError(str(error), remedy) from error


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Print a BenchError in two lines and end with 1."""
    try:
        yield
    except BenchError as error:
        notes.print(f"[bold red]error:[/] {error.message}", soft_wrap=True)
        if error.remedy:
            notes.print(f"[bold]remedy:[/] {error.remedy}", soft_wrap=True)
        raise SystemExit(1) from error
