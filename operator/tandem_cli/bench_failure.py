"""The errors of `tandem bench`."""

from collections.abc import Iterator
from contextlib import contextmanager

from tandem_bench.errors import BenchError
from tandem_cli.errors import CliError


@contextmanager
def told() -> Iterator[None]:
    """A block whose BenchError becomes the command's own error."""
    try:
        yield
    except BenchError as error:
        raise CliError(error.message, error.remedy) from error


def parse_lengths(text: str, option: str) -> tuple[int, int]:
    """The bounds in a length like `512` or `100-1024`."""
    low, dash, high = text.partition("-")
    try:
        return int(low), int(high if dash else low)
    except ValueError:
        raise CliError(
            f"{option} {text!r} is not a length", "write it like 512 or 100-1024"
        ) from None
