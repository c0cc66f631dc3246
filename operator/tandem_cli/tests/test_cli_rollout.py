"""`tandem rollout`: the steps of a service as the API server shows it."""

import json
import subprocess
from typing import Any

import pytest
from typer.testing import CliRunner

from tandem_cli import rollout
from tandem_cli.errors import CliError, NotRunning
from tandem_cli.main import app
from tandem_operator.manifests.revision import model_id_of
from tandem_operator.pair import Pair
from tandem_operator.plan.rollout.counts import Counts, Goal, Workers
from tandem_operator.plan.rollout.preview import preview
from tandem_operator.tests.facts import make_spec

SPEC = {
    "prefill": {"replicas": 1},
    "decode": {"replicas": 2},
    "rollout": {"maxSurge": 0, "maxUnavailable": 1},
}


def owned(kind: str, uid: str) -> list[dict[str, str]]:
    return [{"kind": kind, "uid": uid}]


def worker(role: str, number: int, revision: str) -> dict[str, Any]:
    name = f"chat-{role}-{revision}{number}"
    return {
        "metadata": {
            "name": name,
            "uid": name,
            "labels": {"tandem.dev/role": role, "tandem.dev/revision": revision},
            "annotations": {"tandem.dev/model-id": model_id_of(make_spec())},
            "ownerReferences": owned("WorkerPool", f"uid-{role}"),
        },
        "spec": {},
        "status": {
            "conditions": [{"type": "Ready", "status": "True"}],
            "containerStatuses": [{"name": "engine", "state": {"running": {}}}],
        },
    }


class FakeCluster:
    """Answers `kubectl get KIND` and remembers patches."""

    def __init__(self, revision: str, routed: str, model: str = "") -> None:
        self.patches: list[Any] = []
        spec = make_spec(**SPEC).model_dump(mode="json", by_alias=True, exclude_unset=True)
        self.items = {
            "tisvc": [{"metadata": {"name": "chat", "uid": "uid", "generation": 2}, "spec": spec}],
            "tpool": [
                {
                    "metadata": {
                        "name": f"chat-{role}",
                        "uid": f"uid-{role}",
                        "ownerReferences": owned("InferenceService", "uid"),
                    },
                    "spec": {"replicas": number, "revision": revision},
                    "status": {"desiredReplicas": number},
                }
                for role, number in (("prefill", 1), ("decode", 2))
            ],
            "deployments": [
                {
                    "metadata": {
                        "name": "chat-router",
                        "labels": {"tandem.dev/revision": routed},
                        "annotations": {"tandem.dev/model-id": model or model_id_of(make_spec())},
                    }
                }
            ],
            "pods": [worker("prefill", 0, "a"), *(worker("decode", n, "a") for n in (1, 2))],
            "controllerrevisions": [],
        }

    def kubectl(self, *args: str, **_: Any) -> subprocess.CompletedProcess[str]:
        if args[0] == "patch":
            self.patches.append(json.loads(args[-1]))
            return subprocess.CompletedProcess([], 0 if args[2] == "chat" else 1, "", "not found")
        return subprocess.CompletedProcess([], 0, json.dumps({"items": self.items[args[1]]}), "")


def run(cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    monkeypatch.setattr(rollout, "find_target", lambda *_: cluster)
    done = CliRunner().invoke(app, ["rollout", *words])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.output


def test_the_steps_of_the_roll_out_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    told = json.loads(run(FakeCluster("b", "a"), monkeypatch, "plan", "chat", "-o", "json"))
    assert (told["revision"], told["rolling"]) == ("b", True)
    assert told["steps"][0] == {
        "prefill": {"new": 0, "old": 1},
        "decode": {"new": 0, "old": 2},
    }
    assert told["steps"][-1] == {
        "prefill": {"new": 1, "old": 0},
        "decode": {"new": 2, "old": 0},
    }
    assert all(sum(step["decode"].values()) in (1, 2) for step in told["steps"])


def test_what_an_edit_would_start(monkeypatch: pytest.MonkeyPatch) -> None:
    text = run(FakeCluster("a", "a"), monkeypatch, "plan", "chat")
    assert "that an edit of the workers would start" in text
    assert "drain 1 prefill, drain 1 decode" in text
    assert "start 1 prefill, start 1 decode" in text


def test_a_change_of_the_model_has_no_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CliError, match="not done in steps"):
        run(FakeCluster("b", "a", model="other"), monkeypatch, "plan", "chat")


def test_an_unknown_service(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotRunning, match="no InferenceService other"):
        run(FakeCluster("a", "a"), monkeypatch, "plan", "other")
    with pytest.raises(CliError, match="can't be set: not found"):
        run(FakeCluster("a", "a"), monkeypatch, "pause", "other")


@pytest.mark.parametrize(("word", "paused"), [("pause", True), ("resume", False)])
def test_pause_and_resume(word: str, paused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = FakeCluster("a", "a")
    run(cluster, monkeypatch, word, "chat")
    assert cluster.patches == [{"spec": {"rollout": {"paused": paused}}}]


def test_a_roll_out_of_a_thousand_has_an_end() -> None:
    desired = Pair(1000, 1000)
    goal = Goal("new", desired, Pair(250, 250), Pair(0, 0), "old")
    old = Counts({"old": desired.map(lambda number: Workers(ready=number))})
    assert preview(old, goal)[-1].get("new").map(lambda each: each.ready) == desired
