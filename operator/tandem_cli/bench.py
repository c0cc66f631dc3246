"""`tandem bench`: every benchmark of `tandem_bench`, with its errors shown as the command's own."""

from collections.abc import Iterator
from contextlib import contextmanager

from tandem_bench.catalog import build_app
from tandem_bench.errors import BenchError
from tandem_cli.errors import CliError


@contextmanager
def as_cli_errors() -> Iterator[None]:
    """A block whose BenchError becomes the command's error."""
    try:
        yield
    except BenchError as error:
        raise CliError(error.message, error.remedy) from error


bench_app = build_app(as_cli_errors)
