"""Every option of `tandem` reaches the code of its command, which looks at it.

`pytest -s` prints the list. The benchmarks' options are in test_every_bench_option_works.py.
"""

import ast
import importlib
import inspect
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints
from unittest.mock import MagicMock

import pytest
import typer
from typer.models import ArgumentInfo, OptionInfo
from typer.testing import CliRunner

from tandem_cli import main
from tandem_cli.errors import CliError
from tests.reading import definition, unread_parameters

Call = tuple[str, tuple[Any, ...], tuple[Any, ...]]


# Arguments that a command can do without, but this option can't.
NEEDS: dict[tuple[str, ...], int] = {
    ("doctor", "namespace"): 1,
    ("doctor", "cluster"): 1,
    ("doctor", "kubeconfig"): 1,
    ("probe", "receiver"): 1,
}


@dataclass(frozen=True)
class Option:
    """An option or an argument, as the command's function declares it."""

    name: str
    kind: Any
    info: OptionInfo | ArgumentInfo
    default: Any

    @property
    def is_required(self) -> bool:
        """Whether the command doesn't run without it."""
        return self.default is inspect.Parameter.empty

    @property
    def sample(self) -> list[str]:
        """The words that give it another value than its default."""
        if isinstance(self.info, ArgumentInfo):
            return ["other"]
        flag = f"--{self.name.replace('_', '-')}"
        choices = {value for part in (self.kind, *get_args(self.kind)) for value in get_args(part)}
        choices = {value for value in choices if isinstance(value, str)} or choices
        if self.kind is bool:
            return [flag]
        if get_origin(self.kind) is not list and any(isinstance(each, str) for each in choices):
            return [f"{flag}={min(choices - {self.default})}"]
        if isinstance(self.default, int | float):
            return [f"{flag}={self.default + 1}"]
        return [f"{flag}=/some/sample"]


@dataclass(frozen=True)
class Command:
    """A subcommand: its words, and the function behind it."""

    words: tuple[str, ...]
    function: Callable[..., Any]

    @property
    def options(self) -> list[Option]:
        """What its command line takes."""
        hints = get_type_hints(self.function, include_extras=True)
        given = inspect.signature(self.function).parameters
        return [
            Option(name, kind.__origin__, kind.__metadata__[0], given[name].default)
            for name, kind in hints.items()
            if get_origin(kind) is Annotated
        ]

    @property
    def targets(self) -> list[tuple[Any, str]]:
        """What it imports when it runs: the module and the name."""
        tree = ast.parse(textwrap.dedent(inspect.getsource(self.function)))
        return [
            (importlib.import_module(str(node.module)), name.name)
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            for name in node.names
        ]

    def needed(self, option: Option) -> list[str]:
        """Values for what has no default, and for what this option has no effect without."""
        missing = NEEDS.get((*self.words, option.name), 0)
        return ["needed" for each in self.options if each.is_required] + ["needed"] * missing


def commands(app: typer.Typer, words: tuple[str, ...] = ()) -> Iterator[Command]:
    """All subcommands, however deep; the benchmarks aside."""
    for info in app.registered_commands:
        assert info.callback is not None
        name = info.name or info.callback.__name__.replace("_", "-")
        yield Command((*words, name), info.callback)
    for group in app.registered_groups:
        if group.typer_instance is not None and group.name != "bench":
            yield from commands(group.typer_instance, (*words, str(group.name)))


COMMANDS = list(commands(main.app))
CASES = [(command, each) for command in COMMANDS for each in command.options]
each_option = pytest.mark.parametrize(
    ("command", "option"),
    CASES,
    ids=["-".join((*command.words, option.name)) for command, option in CASES],
)


def run(command: Command, words: list[str], monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """What a command calls for these words."""
    calls: list[Call] = []
    for module, name in command.targets:

        def record(*args: Any, _name: str = name, **kwargs: Any) -> Any:
            calls.append((_name, args, tuple(sorted(kwargs.items()))))
            return MagicMock()

        monkeypatch.setattr(module, name, record)
    for variable in ("TANDEM_CLUSTER", "TANDEM_KUBECONFIG"):
        monkeypatch.delenv(variable, raising=False)
    done = CliRunner().invoke(main.app, [*command.words, *words])
    assert isinstance(done.exception, SystemExit | None), done.exception
    assert done.exit_code == 0, done.output
    # A mock is another one in each run.
    return [(name, tuple(map(shown, args)), named) for name, args, named in calls]


def shown(value: Any) -> Any:
    return "mock" if isinstance(value, MagicMock) else value


@each_option
def test_every_option_reaches_the_code(
    command: Command, option: Option, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = command.needed(option)
    before = run(command, needed, monkeypatch)
    needed = [] if option.is_required else needed
    after = run(command, [*option.sample, *needed], monkeypatch)
    assert before
    assert before != after


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: "-".join(command.words))
def test_the_code_looks_at_all_that_it_gets(command: Command) -> None:
    print(" ".join(command.words), [option.name for option in command.options])
    for module, name in command.targets:
        found = unread_parameters(definition(module, name))
        assert found == set(), f"{module.__name__}.{name} never reads {found}"
        made = getattr(module, name)
        if inspect.isclass(made):
            text = inspect.getsource(made)
            for attribute in ("_endpoint", "_max_tokens", "_temperature", "_complete"):
                assert text.count(f"self.{attribute}") > 1


def test_every_option_is_explained() -> None:
    print(len(COMMANDS), "commands,", len(CASES), "options")
    silent = [
        f"{' '.join(command.words)} {option.name}"
        for command, option in CASES
        if not option.info.help
    ]
    assert silent == []


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (["status", "-o", "xml"], "--output"),
        (["cluster", "status", "-o", "yaml"], "--output"),
        (["logs", "a", "--role", "both"], "--role"),
        (["logs", "a", "--tail=-2"], "--tail"),
        (["serve", "mock://tiny", "--prefill=-1"], "--prefill"),
        (["serve", "mock://tiny", "--port=0"], "--port"),
        (["serve", "mock://tiny", "--port=65536"], "--port"),
        (["up", "--timeout=0"], "--timeout"),
        (["chat", "--max-tokens=0"], "--max-tokens"),
        (["chat", "--temperature=-1"], "--temperature"),
        (["cluster", "up", "--nodes=0"], "--nodes"),
        (["doctor", "--transfer=Rdma"], "--transfer"),
        (["probe", "a", "--blocks=0"], "--blocks"),
    ],
)
def test_a_value_without_sense_is_refused(words: list[str], flag: str) -> None:
    done = CliRunner().invoke(main.app, words)
    assert done.exit_code == 2
    assert flag in done.output


@pytest.mark.parametrize(
    "words",
    [
        ["status", "--cluster=a", "--kubeconfig=b"],
        ["status", "--kubeconfig=b", "--cluster=a"],
        ["logs", "operator", "--role=decode"],
        ["logs", "operator", "-n", "default"],
        ["chat", "other", "--url=http://a"],
        ["chat", "--url=http://a", "-n", "b"],
        ["chat", "--url=http://a", "--cluster=b"],
        ["chat", "--url=http://a", "--kubeconfig=b"],
        ["doctor", "--namespace=a"],
        ["doctor", "--cluster=a"],
        ["doctor", "--kubeconfig=a"],
        ["doctor", "a", "--transfer=Tcp"],
    ],
)
def test_options_of_which_one_has_no_effect_are_refused(words: list[str]) -> None:
    done = CliRunner().invoke(main.app, words)
    assert isinstance(done.exception, CliError)
    assert "leave" in done.exception.remedy


def test_a_flag_wins_over_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    from tandem_cli import status

    asked: list[tuple[str, Path | None]] = []
    monkeypatch.setattr(status, "show_status", lambda *given: asked.append(given[:2]))
    monkeypatch.setenv("TANDEM_KUBECONFIG", "/k")
    monkeypatch.setenv("TANDEM_CLUSTER", "c")
    for words in ([], ["--cluster=d"], ["--kubeconfig=/l"]):
        assert CliRunner().invoke(main.app, ["status", *words]).exit_code == 0
    assert asked == [("c", Path("/k")), ("d", None), ("c", Path("/l"))]
