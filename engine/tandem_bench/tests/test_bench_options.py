"""Options become a command line, and every benchmark has some."""

import subprocess
import sys
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from tandem_bench.catalog import BENCHMARKS, Benchmark
from tandem_bench.errors import WorkloadError
from tandem_bench.options import (
    REST_SETTINGS,
    argument,
    build_command,
    json_option,
    option,
    parse_lengths,
    parse_numbers,
    parse_pairs,
    required,
    rest,
    takes_rest,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Every kind of field."""

    shapes: tuple[str, ...] = argument("Several words.", default=())
    model: str = required("Must be given.")
    rounds: int = option(3, "A number.", minimum=1)
    graphs: bool = option(True, "On or off.")
    key: str = option("", "Not shown.", secret=True)
    json_file: Path | None = json_option()


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions:
    """What hands the rest on."""

    model: str = required("Must be given.")
    flags: tuple[str, ...] = rest("What is left.")


def parse(*words: str) -> tuple[int, list[Options], str]:
    """Exit code, what the benchmark was called with, and the output."""
    called: list[Options] = []
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(build_command(Options, called.append))
    done = CliRunner().invoke(app, list(words))
    return done.exit_code, called, done.output


def test_defaults_are_the_fields_own() -> None:
    code, called, _ = parse("--model", "m")
    assert (code, called) == (0, [Options(model="m")])


def test_every_kind_of_field_is_read() -> None:
    _, called, _ = parse(
        "1x2", "3x4", "--model", "m", "--rounds", "7", "--no-graphs", "--json", "out.json",
    )  # fmt: skip
    wanted = Options(
        shapes=("1x2", "3x4"), model="m", rounds=7, graphs=False, json_file=Path("out.json")
    )
    assert called == [wanted]


def test_what_is_not_the_benchmarks_own_is_handed_on() -> None:
    called: list[WorkerOptions] = []
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command(context_settings=REST_SETTINGS)(build_command(WorkerOptions, called.append))
    CliRunner().invoke(app, ["--device=cpu", "--model", "m", "--dtype", "Float32"])
    assert called == [WorkerOptions(model="m", flags=("--device=cpu", "--dtype", "Float32"))]


def test_wrong_words_end_with_the_flags_name() -> None:
    for words in (("--rounds", "3"), ("--model", "m", "--rounds", "0")):
        code, called, output = parse(*words)
        assert (code, called) == (2, [])
        assert "--model" in output or "--rounds" in output


def test_a_secret_is_not_in_the_repr() -> None:
    assert "hush" not in repr(Options(model="m", key="hush"))


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda each: str(each.name))
def test_every_benchmark_has_frozen_options_with_help(benchmark: Benchmark) -> None:
    module = import_module(f"tandem_bench.{benchmark.module}")
    assert module.Options.__doc__
    assert module.Options.__dataclass_params__.frozen
    assert all("command line" in each.metadata for each in fields(module.Options))
    assert callable(module.run)
    assert takes_rest(module.Options) == (benchmark.name in ("offline", "startup"))


def test_names_are_unique_and_listed_under_a_heading() -> None:
    assert len({benchmark.name for benchmark in BENCHMARKS}) == len(BENCHMARKS)
    assert all(benchmark.panel and benchmark.says.endswith(".") for benchmark in BENCHMARKS)


def test_lists_pairs_and_lengths_name_their_flag() -> None:
    assert parse_numbers("1,8", "--rows") == [1, 8]
    assert parse_pairs("1x2", "--cases") == [(1, 2)]
    assert parse_lengths("5-9", "--input-len") == (5, 9)
    assert parse_lengths("5", "--input-len") == (5, 5)
    for parser, flag in ((parse_numbers, "--rows"), (parse_pairs, "--cases")):
        with pytest.raises(WorkloadError, match=f"{flag} 'x' is not a list"):
            parser("x", flag)
    with pytest.raises(WorkloadError, match="--input-len 'x' is not a length"):
        parse_lengths("x", "--input-len")


def test_without_the_command_an_error_has_two_lines() -> None:
    words = [sys.executable, "-m", "tandem_bench", "shape", "llama-9b", "nowhere"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "error: there is no shape called 'llama-9b'" in done.stderr
    assert "remedy: choose from llama-8b" in done.stderr
