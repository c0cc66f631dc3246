"""`kubectl delete --cascade=orphan`: workers go on, and the service applied again adopts them."""

import httpx
import pytest
from deadlines import patience

from tandem_local import LocalCluster
from tests.service import Service, mock_manifest
from tests.waiting import wait_for

pytestmark = pytest.mark.cluster


def uids(service: Service) -> set[str]:
    return {pod["metadata"]["uid"] for pod in service.pods() if not is_leaving(pod)}


def is_leaving(pod: dict[str, dict[str, object]]) -> bool:
    return "deletionTimestamp" in pod["metadata"]


def test_orphans_serve_and_are_adopted(tandem: LocalCluster) -> None:
    manifest = mock_manifest("orphans")
    with Service.running(tandem, manifest) as service:
        before, url = uids(service), service.url
        service.kubectl("delete", "tisvc", "orphans", "--cascade=orphan", "--timeout=60s")
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
            owners = service.get(kind, name)["metadata"]["ownerReferences"]
            assert [owner["uid"] for owner in owners] == [uid]
        service.kubectl("delete", "tpool", "orphans-decode", "--cascade=orphan")

        def adopted() -> bool:
            found = service.get("tpool", "orphans-decode").get("metadata", {}).get("uid")
            owners = {
                pod["metadata"].get("ownerReferences", [{"uid": ""}])[0]["uid"]
                for pod in service.pods("decode")
            }
            return owners == {found} != {pool["metadata"]["uid"]}

        wait_for("the new pool owns the workers", adopted, 60)
        assert uids(service) == before
    wait_for("nothing is left", lambda: not service.pods(), 120)
