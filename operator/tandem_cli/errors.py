"""Errors of the command line.

CliError             a message and a remedy; printed without a traceback, exit code 1
└── NotRunning       there is no cluster or service of that name
"""


class CliError(Exception):
    """Something the user can fix: `message` says what is wrong, `remedy` what to do."""

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy


class NotRunning(CliError):
    """There is no cluster or service of that name."""
