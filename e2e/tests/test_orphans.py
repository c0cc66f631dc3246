"""`kubectl delete --cascade=orphan`: workers go on, and the service applied again adopts them."""

from functools import partial

import httpx
import pytest
from deadlines import patience

from tandem_local import LocalCluster
from tests.service import Service, mock_manifest
from tests.waiting import wait_for

pytestmark = pytest.mark.cluster
LABEL = "tandem.dev/service=orphans"


def uids(service: Service) -> set[str]:
    return {pod["metadata"]["uid"] for pod in service.pods() if not is_leaving(pod)}


def is_leaving(pod: dict[str, dict[str, object]]) -> bool:
    return "deletionTimestamp" in pod["metadata"]


def orphan(service: Service, kind: str, name: str) -> None:
    """Delete an object without what it owns, and wait until it is gone."""
    limit = patience(60)
    arguments = ("delete", kind, name, "--cascade=orphan", f"--timeout={limit:.0f}s")
    service.kubectl(*arguments, timeout=limit + patience(30))


def owners_of(service: Service, kind: str, name: str) -> list[str]:
    owners = service.get(kind, name).get("metadata", {}).get("ownerReferences", [])
    return [owner["uid"] for owner in owners]


def is_owned(service: Service, kind: str, name: str, uid: str) -> bool:
    return owners_of(service, kind, name) == [uid]


def secrets_of(service: Service) -> list[str]:
    return service.kubectl("get", "secrets", "-l", LABEL, "-o", "name").split()


def test_orphans_serve_and_are_adopted(tandem: LocalCluster) -> None:
    manifest = mock_manifest("orphans")
    with Service.running(tandem, manifest) as service:
        before, url = uids(service), service.url
        assert len(secrets_of(service)) == 1
        orphan(service, "tisvc", "orphans")
        assert not service.get()
        body = {"model": "orphans", "prompt": "anyone there", "max_tokens": 3}
        for _ in range(3):
            answer = httpx.post(f"{url}/v1/completions", json=body, timeout=patience(60))
            assert answer.status_code == 200, answer.text
        assert uids(service) == before
        pool = service.get("tpool", "orphans-decode")
        assert not pool["metadata"].get("ownerReferences")

        Service.apply(tandem, manifest).wait_ready()
        assert uids(service) == before
        uid = service.get()["metadata"]["uid"]
        for kind, name in (("tpool", "orphans-decode"), ("deployment", "orphans-router")):
            # A step that failed is made again after the pass that found the workers ready.
            wait_for(f"the new service owns {name}", partial(is_owned, service, kind, name, uid))
        orphan(service, "tpool", "orphans-decode")

        def adopted() -> bool:
            found = service.get("tpool", "orphans-decode").get("metadata", {}).get("uid")
            owners = {
                pod["metadata"].get("ownerReferences", [{"uid": ""}])[0]["uid"]
                for pod in service.pods("decode")
            }
            return owners == {found} != {pool["metadata"]["uid"]}

        wait_for("the new pool owns the workers", adopted, 60)
        assert uids(service) == before
    wait_for("nothing is left", lambda: not service.pods() and not secrets_of(service), 120)
