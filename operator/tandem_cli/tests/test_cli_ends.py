"""How `tandem status` shows an operator that is gone, and how `tandem uninstall` removes one."""

import json
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import pytest

from tandem_cli import status, uninstall
from tandem_cli.errors import CliError
from tandem_cli.heartbeat import STALE_SECONDS, Heartbeat, read_lease
from tandem_cli.status import readiness
from tandem_cli.uninstall import Release, read_releases

NOW = datetime(2026, 11, 29, 12, 0, tzinfo=UTC)
OPERATOR = "tandem-system/tandem-operator"


def lease(age: float) -> dict[str, Any]:
    at = datetime.now(UTC) - timedelta(seconds=age)
    return {"spec": {"renewTime": at.isoformat().replace("+00:00", "Z")}}


def test_a_heartbeat_goes_stale() -> None:
    fresh = Heartbeat(OPERATOR, NOW - timedelta(seconds=STALE_SECONDS - 1))
    assert fresh.silent(NOW) == ""
    old = Heartbeat(OPERATOR, NOW - timedelta(minutes=7))
    assert f"{OPERATOR} was last alive 7 min ago" in old.silent(NOW)
    assert "is not there (gone)" in Heartbeat(OPERATOR, problem="gone").silent(NOW)
    assert "no operator serves it" in Heartbeat("").silent(NOW)
    assert read_lease(OPERATOR, {"spec": {}}).problem
    at = {"spec": {"renewTime": "2026-11-29T11:00:00.000000Z"}}
    assert read_lease(OPERATOR, at).seen == NOW - timedelta(hours=1)


class FakeCluster:
    """Answers kubectl, and notes what was asked."""

    kubeconfig = Path("/k")

    def __init__(self, age: float = 1.0, deleted: int = 0) -> None:
        self.calls: list[str] = []
        self._age, self._deleted = age, deleted

    def kubectl(self, *args: str, **_: Any) -> subprocess.CompletedProcess[str]:
        self.calls.append("kubectl " + " ".join(args))
        kind = args[1]
        answers: dict[str, Any] = {
            "service": {"items": []},
            "tisvc": {"items": [SERVICE]},
            "lease": lease(self._age),
            "deployments": {"items": [deployment("prod", "apps"), deployment("tandem", "sys")]},
        }
        if args[0] == "delete" and kind == "inferenceservices":
            return subprocess.CompletedProcess(args, self._deleted, "", "timed out")
        return subprocess.CompletedProcess(args, 0, json.dumps(answers.get(kind, kind)), "")

    def helm(self, *args: str, **_: Any) -> subprocess.CompletedProcess[str]:
        self.calls.append("helm " + " ".join(args))
        return subprocess.CompletedProcess(args, 0, "", "")


SERVICE: dict[str, Any] = {
    "metadata": {"name": "s", "namespace": "n"},
    "status": {
        "operator": OPERATOR,
        "conditions": [{"type": "Ready", "status": "True"}],
        "pools": [],
    },
}


def deployment(release: str, namespace: str) -> dict[str, Any]:
    notes = {"meta.helm.sh/release-name": release, "meta.helm.sh/release-namespace": namespace}
    return {"metadata": {"name": "x", "annotations": notes}}


@pytest.mark.parametrize(("age", "ready"), [(1.0, "True"), (3600.0, "Unknown")])
def test_status_claims_ready_only_while_an_operator_knows(
    age: float, ready: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(status, "find_target", lambda *_: FakeCluster(age))
    monkeypatch.setattr(status, "find_url", lambda *_: "")
    status.show_status("c", None, "json")
    (shown,) = json.loads(capsys.readouterr().out)["services"]
    assert readiness(shown) == ready
    assert (shown["operator"]["problem"] == "") == (ready == "True")
    assert shown["operator"]["name"] == OPERATOR


def test_releases_of_any_name_are_found() -> None:
    plain = {"metadata": {"name": "by-hand"}}
    found = read_releases([deployment("prod", "apps"), deployment("prod", "apps"), plain])
    assert found == [Release("apps", "prod")]


def test_uninstall_removes_services_then_operators_then_crds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster = FakeCluster()
    monkeypatch.setattr(uninstall, "find_target", lambda *_: cluster)
    uninstall.uninstall("c", None, keep_services=False, timeout=5)
    steps = [call for call in cluster.calls if " get " not in call]
    assert steps[0].startswith("kubectl delete inferenceservices --all -A --cascade=foreground")
    assert steps[1:3] == [
        "helm uninstall prod -n apps --ignore-not-found",
        "helm uninstall tandem -n sys --ignore-not-found",
    ]
    assert steps[3].startswith("kubectl delete crd inferenceservices.tandem.dev workerpools.")
    cluster.calls.clear()
    uninstall.uninstall("c", None, keep_services=True, timeout=5)
    assert not [call for call in cluster.calls if call.startswith("kubectl delete")]
    assert len([call for call in cluster.calls if call.startswith("helm")]) == 2


def test_services_that_still_stream_are_told_and_keep_their_operator() -> None:
    cluster = cast("Any", FakeCluster(deleted=1))
    with pytest.raises(CliError) as refused:
        uninstall.delete_services(cluster, 5)
    assert "rollout.drainSeconds" in refused.value.remedy
