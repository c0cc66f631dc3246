"""Errors of the benchmarks.

BenchError             a message and a remedy; the command prints both and exits with 1
├── WorkloadError      options or a trace that make no sense (a ValueError too)
├── EndpointError      the endpoint can't be measured at all
├── ReportError        a file that is not a report of ours
├── EngineError        the engine refused or stopped in an offline run
└── NoGpuError         kernels and steps are measured on a GPU only
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
    """The engine refused or stopped in an offline run."""


class NoGpuError(BenchError):
    """Kernels and steps are measured on a GPU only."""
