"""Errors of the benchmarks.

BenchError             a message and a remedy; the command prints both and exits with 1
├── WorkloadError      options or a trace that make no sense (a ValueError too)
├── EndpointError      the endpoint can't be measured at all
├── ReportError        a file that is not a report of ours
├── EngineError        the engine refused or stopped
├── CheckFailedError   a result was wrong: a kernel's, KV after a hand-off, a token
├── LinkError          a GPU's memory can't be shared with another process, or arrived changed
├── MissingPackageError  a package that the benchmark needs isn't installed
└── NoGpuError         kernels and steps are measured on a GPU only
WrongResultError       an AssertionError: a kernel's result is outside its tolerance
"""


class BenchError(Exception):
    """`message` says what is wrong, `remedy` what to do."""

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy


class WorkloadError(BenchError, ValueError):
    """Options or a trace that make no sense."""


class EndpointError(BenchError):
    """The endpoint can't be measured at all."""


class ReportError(BenchError):
    """A file that is not a report of ours."""


class EngineError(BenchError):
    """The engine refused or stopped."""


class CheckFailedError(BenchError):
    """A result was wrong; nothing is reported for it."""


class LinkError(BenchError):
    """A GPU's memory can't be shared with another process, or arrived changed."""


class MissingPackageError(BenchError):
    """A package that the benchmark needs isn't installed."""


class NoGpuError(BenchError):
    """Kernels and steps are measured on a GPU only."""


class WrongResultError(AssertionError):
    """A kernel's result is outside its tolerance: no time is reported for it."""
