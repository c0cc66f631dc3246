"""One check: what was looked at, what was found, and the remedy."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tandem_wire.handoff import TransportName

Verdict = Literal["ok", "warn", "fail"]
RDMA_TRANSPORTS: tuple[TransportName, ...] = ("nixl", "mooncake")
"""Those that use RDMA devices where there are any."""


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check. A remedy is there unless the verdict is `ok`.

    `matters_to` are the transports that are slower, or don't work, without it; empty: all.
    `rules_out` are those that can't work at all.
    """

    name: str
    subject: str
    verdict: Verdict
    finding: str
    remedy: str = ""
    matters_to: tuple[TransportName, ...] = ()
    rules_out: tuple[TransportName, ...] = ()

    def __post_init__(self) -> None:
        assert (self.verdict == "ok") is not bool(self.remedy)
        assert not self.rules_out or self.verdict == "fail"

    @property
    def sentence(self) -> str:
        """Finding and remedy in one line, for a log or a reason."""
        return f"{self.finding}: {self.remedy}" if self.remedy else self.finding

    def as_json(self) -> dict[str, Any]:
        """The check for `-o json` and `/state`."""
        return asdict(self)


def read_text(path: Path) -> str:
    """A file's text; empty if there is none or it can't be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
