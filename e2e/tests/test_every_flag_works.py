"""Every flag of operator, router and worker changes the configuration, which is read elsewhere.

`pytest -s` prints the list.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pytest

from tandem_engine import config as worker
from tandem_engine.errors import ConfigError
from tandem_engine.mock import latency
from tandem_operator import config as operator
from tandem_router import main as router
from tandem_router.config import RouterConfig
from tests.reading import properties, reads

Action = argparse.Action
ENV = {"POD_NAME": "pod", "HOME": "/root"}


@dataclass(frozen=True)
class Program:
    """A program: its parser, what its flags become, and where that is read."""

    name: str
    package: str
    parser: argparse.ArgumentParser
    configure: Callable[[list[str]], Any]
    config: type[Any]
    base: tuple[str, ...] = ()  # what it doesn't start without
    samples: dict[str, str] = field(default_factory=dict)  # of flags that don't take any text
    instead: dict[str, tuple[str, ...]] = field(default_factory=dict)  # what else replaces the base
    elsewhere: dict[str, str] = field(default_factory=dict)  # flags that aren't in the config

    @property
    def actions(self) -> dict[str, Action]:
        """Each flag that does more than print and exit, by its longest name."""
        return {
            action.option_strings[0]: action
            for action in self.parser._actions
            if not isinstance(action, argparse._HelpAction | argparse._VersionAction)
        }


def operator_config(argv: list[str]) -> operator.Config:
    return operator.read_config(argv, ENV)


def router_config(argv: list[str]) -> RouterConfig:
    return router.parse_config(router.build_parser().parse_args(argv))


def worker_config(argv: list[str]) -> worker.WorkerConfig:
    return worker.parse_args([*argv], ENV)


OPERATOR = Program(
    "tandem-operator",
    "operator/tandem_operator",
    operator.build_parser(ENV),
    operator_config,
    operator.Config,
    samples={"--log-level": "debug"},
)
ROUTER = Program(
    "tandem-router",
    "engine/tandem_router",
    router.build_parser(),
    router_config,
    RouterConfig,
    base=("--model=mock://tiny", "--worker=127.0.0.1:1"),
    samples={
        "--model": "mock://other",
        "--worker": "127.0.0.1:2",
        "--slo-classes": '[{"name": "chat"}]',
        "--cors-origin": "https://app.example",
        "--api-keys-file": str(Path(__file__)),
    },
    instead={
        "--service": ("--model=mock://tiny",),
        "--namespace": ("--model=mock://tiny", "--service=chat"),
    },
    elsewhere={
        "--log-level": "test_the_log_of_the_router_follows_its_flags",
        "--no-access-log": "test_the_log_of_the_router_follows_its_flags",
    },
)
WORKER = Program(
    "tandem-worker",
    "engine/tandem_engine",
    worker._build_parser(),
    worker_config,
    worker.WorkerConfig,
    base=("--model=mock://tiny",),
    samples={
        "--model": "mock://other",
        "--kv-memory": "1Gi",
        "--chunk-tokens": "64",
        "--page-size": "32",
        "--admin-token-file": str(Path(__file__)),
    },
    instead={"--mock": ()},
)
PROGRAMS = (OPERATOR, ROUTER, WORKER)
CASES = [(program, flag) for program in PROGRAMS for flag in program.actions]
each_flag = pytest.mark.parametrize(
    ("program", "flag"), CASES, ids=[f"{program.name}-{flag}" for program, flag in CASES]
)


def words(program: Program, flag: str) -> list[str]:
    """The flag with a value other than its default."""
    action = program.actions[flag]
    if flag in program.samples:
        return [f"{flag}={program.samples[flag]}"]
    if isinstance(action, argparse.BooleanOptionalAction):
        return [f"--no-{flag[2:]}" if action.default else flag]
    if action.nargs == 0:
        return [flag]
    if action.choices:
        return [f"{flag}={next(value for value in action.choices if value != action.default)}"]
    if isinstance(action.default, int | float):
        lower = max(1, action.default - 1)
        return [f"{flag}={lower if lower != action.default else lower + 1}"]
    return [f"{flag}={'7' if action.type else 'sample'}"]


def differing(program: Program, flag: str) -> set[str]:
    """The fields of the configuration that the flag changes."""
    base = program.instead.get(flag, program.base)
    given = words(program, flag)
    after = program.configure([*base, *given])
    if base != program.base:  # it replaces what is left out
        other = [word.replace("sample", "another") for word in given]
        before = program.configure([*base, *other])
    else:
        before = program.configure([*base])
    names = [each.name for each in fields(program.config)]
    noise = {"boot_id", "router_id"}
    return {
        name
        for name in names
        if getattr(before, name) != getattr(after, name) and name not in noise
    }


def readers(program: Program) -> dict[str, set[str]]:
    """Who reads each field of the configuration; a property passes its readers on."""
    holders = frozenset({"config", "limits"})
    found = {
        name: {path.name for path in paths} for name, paths in outside(program, holders).items()
    }
    for method, attributes in properties(program.package, program.config.__name__).items():
        for name in attributes:
            found.setdefault(name, set()).update(found.get(method, set()))
    return found


def outside(program: Program, holders: frozenset[str]) -> dict[str, set[Path]]:
    """Reads of the configuration in any module but the one that makes it."""
    own = Path(str(__import__(program.config.__module__, fromlist=["x"]).__file__)).resolve()
    return {
        name: {path for path in paths if path.resolve() != own}
        for name, paths in reads(program.package, holders).items()
    }


@each_flag
def test_every_flag_changes_the_configuration(program: Program, flag: str) -> None:
    if flag in program.elsewhere:
        assert callable(globals()[program.elsewhere[flag]])
    else:
        assert differing(program, flag)


@each_flag
def test_what_a_flag_changes_is_read(program: Program, flag: str) -> None:
    found = readers(program)
    for name in () if flag in program.elsewhere else differing(program, flag):
        assert found.get(name), f"{program.name} {flag}: nobody reads {name}"


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_every_setting_is_read_by_someone(program: Program) -> None:
    found = readers(program)
    unread = [each.name for each in fields(program.config) if not found.get(each.name)]
    print(program.name, len(program.actions), "flags,", len(fields(program.config)), "settings")
    for flag in program.actions:
        if flag not in program.elsewhere:
            names = sorted(differing(program, flag))
            print(f"  {flag}:", "; ".join(f"{name} ({len(found[name])} modules)" for name in names))
    assert unread == []


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_a_shortened_flag_is_refused(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    """A later version may have another flag of this beginning."""
    with pytest.raises((SystemExit, ValueError)) as ended:
        program.configure([*program.base, "--hos=1", "--log-lev=debug"])
    assert "--hos=1" in capsys.readouterr().err + str(ended.value)


def test_the_log_of_the_router_follows_its_flags(capsys: pytest.CaptureFixture[str]) -> None:
    import structlog

    def said(*flags: str) -> list[str]:
        given = router.build_parser().parse_args([*ROUTER.base, *flags])
        router.configure_logging(given.log_level, not given.no_access_log)
        for name in ("access", "router"):
            structlog.get_logger(name).info(name)
            structlog.get_logger(name).debug("detail")
        return [line for line in capsys.readouterr().out.splitlines() if line]

    try:
        assert len(said()) == 2
        assert len(said("--log-level=debug")) == 4
        assert said("--log-level=error") == []
        assert len(said("--no-access-log")) == 1
    finally:
        structlog.reset_defaults()


MOCK_OPTIONS = (*latency._OVERRIDES, "prefill_ms", "decode_ms")


def took(profile: latency.MockProfile) -> list[float]:
    """The seconds of a step of decodes and of one with a prompt."""
    return [profile.step_seconds([100, 200], []), profile.step_seconds([], [(0, 300)])]


@pytest.mark.parametrize("name", MOCK_OPTIONS)
def test_every_option_of_a_mock_has_an_effect(name: str) -> None:
    before, after = (latency.parse_profile(f"h100-8b{end}") for end in ("", f"?{name}=1000"))
    assert before != after
    if took(before) == took(after):
        # It isn't about time, so the runner must look at it.
        assert reads("engine/tandem_engine/mock", frozenset({"profile"}))[name]


@pytest.mark.parametrize("name", MOCK_OPTIONS)
@pytest.mark.parametrize("value", ["-1", "nan", "inf", "x", ""])
def test_a_mock_takes_only_numbers_from_zero_on(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"--mock: {name}="):
        latency.parse_profile(f"h100-8b?{name}={value}")
