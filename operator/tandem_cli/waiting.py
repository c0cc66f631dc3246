"""Waiting for pods, for as long as waiting can help.

A container that can't start, or that has crashed more than once, ends the wait at once, with the
pod, the reason and the last lines of its log.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tandem_cli.errors import CliError
from tandem_cli.target import get_items

if TYPE_CHECKING:
    from tandem_local import Cluster

# What a waiting container says when it can't start. Some of these mend themselves within moments (a
# Secret appears, a registry answers), so each must last.
CANNOT_START = frozenset(
    {
        "CreateContainerConfigError",
        "CreateContainerError",
        "ErrImageNeverPull",
        "ImageInspectError",
        "ImagePullBackOff",
        "InvalidImageName",
        "PostStartHookError",
        "RunContainerError",
    }
)
# What a container that ended says if its program never ran.
NEVER_RAN = frozenset({"ContainerCannotRun", "StartError"})
LASTS_S = 5.0
# A crash can be bad luck; a second one after a restart is not.
NUM_CRASHES = 2
LOG_LINES = 15


@dataclass(frozen=True)
class Trouble:
    """A container that waiting will not mend."""

    namespace: str
    pod: str
    container: str
    reason: str
    message: str
    certain: bool
    """Whether it needs no second look."""


def find_troubles(pod: dict[str, Any]) -> Iterator[Trouble]:
    """The containers of a pod, as kubectl prints it, that can't start or keep crashing."""
    status = pod.get("status", {})
    if pod["metadata"].get("deletionTimestamp"):
        return
    for item in [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]:
        waiting = item.get("state", {}).get("waiting") or {}
        ended = item.get("state", {}).get("terminated") or {}
        last = ended or item.get("lastState", {}).get("terminated") or {}
        reason, message = waiting.get("reason", ""), waiting.get("message", "")
        crashed = reason == "CrashLoopBackOff" or ended.get("exitCode", 0) != 0
        crashes = item.get("restartCount", 0) + (1 if crashed else 0)
        if reason in CANNOT_START:
            certain = False
        elif crashed and last.get("reason") in NEVER_RAN:
            reason, message, certain = last["reason"], last.get("message", ""), False
        elif crashed and crashes >= NUM_CRASHES:
            reason = f"it has ended {crashes} times, the last time with {_describe_end(last)}"
            message, certain = last.get("message", ""), True
        else:
            continue
        meta = pod["metadata"]
        yield Trouble(meta["namespace"], meta["name"], item["name"], reason, message, certain)


def _describe_end(ended: dict[str, Any]) -> str:
    reason = ended.get("reason", "Error")
    return f"exit code {ended.get('exitCode', '?')}" + (f" ({reason})" if reason != "Error" else "")


@dataclass
class PodWatch:
    """Looks at the pods of one selector, again and again while something else is awaited."""

    target: "Cluster"
    namespace: str
    selector: str
    _since: dict[tuple[str, str], float] = field(default_factory=dict)

    def renew(self) -> None:
        """Delete the pods that are in trouble already: what was wrong may have been mended."""
        for pod in sorted({trouble.pod for trouble in self._find()}):
            self.target.kubectl(
                *("delete", "pod", "-n", self.namespace, pod, "--ignore-not-found"),
                *("--wait=false", "--grace-period=1"),
            )

    def check(self, what: str) -> None:
        """Raise CliError, saying that `what` can't become ready, if waiting can't help."""
        found = self._find()
        now = time.monotonic()
        self._since = {
            (t.pod, t.container): self._since.get((t.pod, t.container), now) for t in found
        }
        for trouble in found:
            lasted = now - self._since[trouble.pod, trouble.container]
            if trouble.certain or lasted >= LASTS_S:
                raise self._error(what, trouble)

    def _find(self) -> list[Trouble]:
        pods = get_items(self.target, "pods", "-n", self.namespace, "-l", self.selector)
        return [trouble for pod in pods for trouble in find_troubles(pod)]

    def _error(self, what: str, trouble: Trouble) -> CliError:
        place = f"pod {trouble.namespace}/{trouble.pod}, container {trouble.container}"
        detail = f": {trouble.message.strip()}" if trouble.message.strip() else ""
        text = f"{what} can't become ready: {place}: {trouble.reason}{detail}"
        for previous in ([], ["--previous"]):
            log = self.target.kubectl(
                *("logs", "-n", trouble.namespace, trouble.pod, "-c", trouble.container),
                *(f"--tail={LOG_LINES}", *previous),
                check=False,
            )
            if log.returncode == 0 and log.stdout.strip():
                text += f"\nIts log ends like this:\n{log.stdout.rstrip()}"
                break
        return CliError(
            text, f"see `tandem kubectl describe pod {trouble.pod} -n {trouble.namespace}`"
        )
