"""When `up` stops waiting: pods that can't start, or crash again and again."""

import json
import subprocess
from typing import TYPE_CHECKING, Any, cast

import pytest

from tandem_cli.errors import CliError
from tandem_cli.waiting import LASTS_S, PodWatch, find_troubles

if TYPE_CHECKING:
    from tandem_local import Cluster


def waiting(reason: str, message: str = "") -> dict[str, Any]:
    return {"state": {"waiting": {"reason": reason, "message": message}}}


def crashed(restarts: int, code: int = 1, reason: str = "Error") -> dict[str, Any]:
    return {
        **waiting("CrashLoopBackOff", "back-off 10s restarting"),
        "lastState": {"terminated": {"exitCode": code, "reason": reason}},
        "restartCount": restarts,
    }


def pod(container: dict[str, Any], kind: str = "containerStatuses") -> dict[str, Any]:
    return {
        "metadata": {"name": "p", "namespace": "n"},
        "status": {kind: [{"name": "c", "restartCount": 0, **container}]},
    }


@pytest.mark.parametrize(
    "container",
    [
        waiting("ContainerCreating"),
        waiting("PodInitializing"),
        # A registry or a Secret may take a moment.
        waiting("ErrImagePull"),
        {"state": {"running": {}}, "restartCount": 7},
        crashed(0),
        {"state": {"terminated": {"exitCode": 0, "reason": "Completed"}}},
    ],
)
def test_what_may_still_start_is_waited_for(container: dict[str, Any]) -> None:
    assert list(find_troubles(pod(container))) == []


@pytest.mark.parametrize(
    ("container", "reason", "certain"),
    [
        (waiting("InvalidImageName"), "InvalidImageName", False),
        (waiting("RunContainerError", "no such file"), "RunContainerError", False),
        (crashed(0, 128, "StartError"), "StartError", False),
        (crashed(1), "it has ended 2 times, the last time with exit code 1", True),
        (
            crashed(2, 137, "OOMKilled"),
            r"ended 3 times, .* exit code 137 \(OOMKilled\)",
            True,
        ),
        (crashed(1, 0, "Completed"), "ended 2 times", True),
    ],
)
@pytest.mark.parametrize("kind", ["containerStatuses", "initContainerStatuses"])
def test_what_cannot_start_or_keeps_crashing_is_trouble(
    kind: str, container: dict[str, Any], reason: str, certain: bool
) -> None:
    import re

    [trouble] = find_troubles(pod(container, kind))
    assert re.search(reason, trouble.reason)
    assert trouble.certain == certain
    gone = pod(container, kind)
    gone["metadata"]["deletionTimestamp"] = "now"
    assert list(find_troubles(gone)) == []


class Kubectl:
    """A cluster of one pod, which records what else it is asked."""

    def __init__(self, container: dict[str, Any]) -> None:
        self.pod = pod(container)
        self.asked: list[tuple[str, ...]] = []

    def kubectl(self, *args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        self.asked.append(args)
        if args[0] == "get":
            return subprocess.CompletedProcess(args, 0, json.dumps({"items": [self.pod]}))
        if args[0] == "logs" and "--previous" not in args:
            return subprocess.CompletedProcess(args, 1, "")
        return subprocess.CompletedProcess(args, 0, "[error] no [bold]weights[/]\n")


def watch(cluster: Kubectl) -> PodWatch:
    return PodWatch(cast("Cluster", cluster), "n", "a=b")


def test_a_crash_loop_ends_the_wait_with_pod_reason_and_log() -> None:
    with pytest.raises(CliError) as ended:
        watch(Kubectl(crashed(1))).check("service n/s")
    assert ended.value.message == (
        "service n/s can't become ready: pod n/p, container c: it has ended 2 times, the last time "
        "with exit code 1\nIts log ends like this:\n[error] no [bold]weights[/]"
    )
    assert "describe pod p -n n" in ended.value.remedy


def test_what_cannot_start_must_last_before_it_ends_the_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [100.0]
    monkeypatch.setattr("tandem_cli.waiting.time.monotonic", lambda: now[0])
    cluster = Kubectl(waiting("RunContainerError", "exec: no such file"))
    pods = watch(cluster)
    pods.check("it")
    now[0] += LASTS_S - 1
    pods.check("it")
    now[0] += 1
    with pytest.raises(CliError, match="container c: RunContainerError: exec: no such file"):
        pods.check("it")
    mended = watch(cluster)
    mended.check("it")
    cluster.pod = pod({"state": {"running": {}}})
    mended.check("it")
    cluster.pod = pod(waiting("RunContainerError"))
    now[0] += LASTS_S
    mended.check("it")


def test_pods_that_were_in_trouble_before_begin_anew() -> None:
    cluster = Kubectl(crashed(5))
    watch(cluster).renew()
    [deleted] = [args for args in cluster.asked if args[0] == "delete"]
    assert deleted[:5] == ("delete", "pod", "-n", "n", "p")


def test_brackets_in_a_quoted_log_are_printed_as_they_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from tandem_cli.console import print_error

    print_error(CliError("log: [error] no [bold]weights[/]", "look at [pod]"))
    assert "[error] no [bold]weights[/]" in capsys.readouterr().err
