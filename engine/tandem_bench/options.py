"""A benchmark's options: one frozen dataclass, from which its command line is made.

A field's default is the flag's default, its type the flag's type, its line of help the flag's help:

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Options:
        \"\"\"What `--help` says first.\"\"\"

        rounds: int = option(3, "Measured rounds.")
        shapes: tuple[str, ...] = argument("Shapes, as ROWSxCOLUMNS.")
        json_file: Path | None = json_option()

Underscores become hyphens, a bool gets `--flag/--no-flag`, a tuple of strings takes several words.
"""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar, get_origin, get_type_hints

import typer

from tandem_bench.errors import WorkloadError

Given = TypeVar("Given")
Options = TypeVar("Options")

REST_SETTINGS: Final = {"allow_extra_args": True, "ignore_unknown_options": True}
LENGTHS: Final = "Tokens; a range is drawn from uniformly."
_KEY: Final = "command line"


@dataclass(frozen=True, slots=True)
class _Flag:
    """What the command line says about one field."""

    says: str
    name: str = ""
    minimum: int | None = None
    metavar: str | None = None
    positional: bool = False
    rest: bool = False

    def parameter(self) -> Any:
        """What typer makes an option or an argument of."""
        if self.positional:
            return typer.Argument(help=self.says, metavar=self.metavar)
        names = (self.name,) if self.name else ()
        return typer.Option(*names, help=self.says, min=self.minimum, metavar=self.metavar)


def option(
    default: Given,
    says: str,
    *,
    name: str = "",
    minimum: int | None = None,
    metavar: str | None = None,
    secret: bool = False,
) -> Given:
    """A flag. `name` is for one that isn't called like its field or has no `--no-` form.

    A `secret` is left out of the options' repr.
    """
    flag = _Flag(says, name, minimum, metavar)
    value: Given = field(default=default, repr=not secret, metadata={_KEY: flag})
    return value


def required(says: str) -> Any:
    """A flag that must be given."""
    return field(metadata={_KEY: _Flag(says)})


def argument(says: str, *, metavar: str | None = None, default: Any = MISSING) -> Any:
    """A word without a flag, needed unless there is a default; a tuple takes several words."""
    return field(default=default, metadata={_KEY: _Flag(says, metavar=metavar, positional=True)})


def rest(says: str) -> tuple[str, ...]:
    """Every flag and word that isn't the benchmark's own."""
    words: tuple[str, ...] = field(default=(), metadata={_KEY: _Flag(says, rest=True)})
    return words


def json_option() -> Path | None:
    """The file that results are written to."""
    return option(None, "Write the results to this file.", name="--json")


def takes_rest(options: type[Any]) -> bool:
    """Whether flags that aren't the benchmark's own are handed on."""
    return any(each.metadata[_KEY].rest for each in fields(options))


def build_command(
    options: type[Options], run: Callable[[Options], None]
) -> Callable[[typer.Context], None]:
    """A function whose signature typer reads: it makes the options and runs the benchmark."""
    hints = get_type_hints(options)
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    ]
    many: set[str] = set()
    rests: list[str] = []
    for each in fields(options):  # type: ignore[arg-type]
        flag: _Flag = each.metadata[_KEY]
        if flag.rest:
            rests.append(each.name)
            continue
        kind = hints[each.name]
        default = inspect.Parameter.empty if each.default is MISSING else each.default
        if flag.positional and get_origin(kind) is tuple:
            many.add(each.name)
            kind = list[str]
            if each.default is not MISSING:
                default = list(each.default)
        annotation = Annotated[kind, flag.parameter()]  # type: ignore[valid-type]
        parameters.append(
            inspect.Parameter(each.name, keyword, default=default, annotation=annotation)
        )

    def command(ctx: typer.Context, **given: Any) -> None:
        given |= {name: tuple(given[name]) for name in many}
        given |= {name: tuple(ctx.args) for name in rests}
        run(options(**given))

    command.__dict__["__signature__"] = inspect.Signature(parameters)
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    command.__doc__ = options.__doc__
    return command


def parse_numbers(text: str, flag: str) -> list[int]:
    """`1,8,64`. Raises WorkloadError, naming the flag."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise WorkloadError(
            f"{flag} {text!r} is not a list of numbers", "write them with commas: 1,8,64"
        ) from None


def parse_pairs(text: str, flag: str) -> list[tuple[int, int]]:
    """`1x1024,32x8192`. Raises WorkloadError, naming the flag."""
    try:
        pairs = [tuple(map(int, part.lower().split("x"))) for part in text.split(",")]
        return [(first, second) for first, second in pairs]
    except ValueError:
        raise WorkloadError(
            f"{flag} {text!r} is not a list of cases",
            "write two numbers per case, such as 1x1024,32x8192",
        ) from None


def parse_lengths(text: str, flag: str) -> tuple[int, int]:
    """`512` or `100-1024`. Raises WorkloadError, naming the flag."""
    low, dash, high = text.partition("-")
    try:
        return int(low), int(high if dash else low)
    except ValueError:
        raise WorkloadError(f"{flag} {text!r} is not a length", "write 512 or 100-1024") from None
