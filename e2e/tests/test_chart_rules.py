"""What the chart refuses, and what it makes of names, images, nodes and connections."""

from typing import Any

import pytest
import yaml

from tests.chart import CHART, Document, container, key_of, refusal, render

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

DIGEST = "sha256:" + 8 * "0123abcd"
BUDGET = "podDisruptionBudget.maxUnavailable"
ENABLED = {"podDisruptionBudget.enabled": True}


@pytest.mark.parametrize(
    ("values", "wrong", "remedy"),
    [
        ({"replicaz": 2}, "'replicaz' not allowed", ""),
        ({"tolerations": [{"kye": "a"}]}, "'kye' not allowed", ""),
        (
            {"metrics.service.enabled": False, "metrics.serviceMonitor.enabled": True},
            "metrics.serviceMonitor.enabled needs metrics.service.enabled",
            "",
        ),
        ({"serviceAccount.create": False}, "serviceAccount.name is required", ""),
        *(
            ({path: name}, f'{path} is "{name}"', "use lower-case letters")
            for path in ("leaderElection.leaseName", "serviceAccount.name", "priorityClassName")
            for name in ("Bad_Name", "-a", "a..b", 254 * "a")
        ),
        ({"fullnameOverride": "a.b"}, 'fullnameOverride is "a.b"', "use lower-case letters"),
        ({"nameOverride": "9a"}, 'nameOverride is "9a"', "with a letter at the start"),
        *(
            ({BUDGET: value}, f'{BUDGET} is "{value}"', "use a number such as 1")
            for value in ("abc", -1, 0, "0%", "101%", "1.5", "")
        ),
        (ENABLED, f'{BUDGET} is "1"', "raise replicas"),
        (ENABLED | {"replicas": 2, BUDGET: "51%"}, f'{BUDGET} is "51%"', "lower max"),
        *(
            ({f"{image}.{part}": value}, f'{image}.{part} is "{value}"', remedy)
            for image in ("image", "images.router", "images.engine")
            for part, value, remedy in (
                ("digest", "abc", "use sha256:"),
                ("digest", DIGEST[:-1], "use sha256:"),
                ("tag", DIGEST, "put a digest into"),
                ("repository", "example:5000/a:1", "put them into"),
                ("repository", f"example/a@{DIGEST}", "put them into"),
            )
        ),
        (
            {"podLabels": {"app.kubernetes.io/name": "x"}},
            'podLabels has "app.kubernetes.io/name"',
            "leave it out",
        ),
        (
            {"metrics.serviceMonitor.labels": {"helm.sh/chart": "x"}},
            'metrics.serviceMonitor.labels has "helm.sh/chart"',
            "leave it out",
        ),
        (
            {"extraArgs": ["--lease-name=x"]},
            'extraArgs has "--lease-name=x"',
            "set leaderElection.leaseName",
        ),
        ({"extraArgs": ["--health-port", "1"]}, 'extraArgs has "--health-port"', "leave it out"),
        (
            {"extraEnv": [{"name": "TANDEM_LOG_LEVEL", "value": "debug"}]},
            'extraEnv has "TANDEM_LOG_LEVEL"',
            "set the value of the chart",
        ),
        ({"extraEnv": [{"name": "POD_NAME"}]}, 'extraEnv has "POD_NAME"', "leave it out"),
    ],
)
def test_a_wrong_value_is_refused_with_its_name(
    values: dict[str, Any], wrong: str, remedy: str
) -> None:
    said = refusal(values)
    assert wrong in said
    assert remedy in said


def test_every_flag_of_the_chart_is_refused_among_the_extra_ones() -> None:
    for argument in container(render({"watchNamespaces": ["team-a"]}))["args"]:
        assert "which the chart writes itself" in refusal({"extraArgs": [argument]})


@pytest.mark.parametrize(("replicas", "value"), [(2, 1), (5, 4), (2, "1%"), (2, "50%"), (3, "66%")])
def test_a_budget_that_keeps_an_operator_is_taken(replicas: int, value: int | str) -> None:
    made = render(ENABLED | {"replicas": replicas, BUDGET: value})
    (budget,) = (each for each in made if each["kind"] == "PodDisruptionBudget")
    assert budget["spec"]["maxUnavailable"] == value


def test_no_two_releases_share_an_object() -> None:
    """Joined by hyphens, `a` and `b-c` would be the same as `a-b` and `c`."""
    places = [("c", "a-b"), ("b-c", "a"), ("b", "a"), ("c-nodes", "a-b"), ("tandem", "a-b")]
    crds = {"CustomResourceDefinition"}
    for namespaces in ([], ["team"]):
        owners: dict[tuple[str, str, str], tuple[str, str]] = {}
        for release, namespace in places:
            for document in render({"watchNamespaces": namespaces}, release, namespace):
                key = key_of(document)
                if document["kind"] not in crds:
                    assert key not in owners, f"{key}: {owners[key]} and {(release, namespace)}"
                    owners[key] = (release, namespace)
        assert {"ClusterRole", "ClusterRoleBinding"} <= {kind for kind, _, _ in owners}


def test_every_binding_names_a_role_that_is_there() -> None:
    for namespaces in ([], ["team"]):
        documents = render({"watchNamespaces": namespaces})
        names = {key_of(document) for document in documents}
        bindings = [each for each in documents if each["kind"].endswith("Binding")]
        assert bindings
        for binding in bindings:
            role = binding["roleRef"]
            inside = binding["metadata"].get("namespace", "") if role["kind"] == "Role" else ""
            assert (role["kind"], inside, role["name"]) in names


def test_the_lease_of_the_flag_is_the_lease_of_the_role() -> None:
    for name in ("", "inference"):
        documents = render({"leaderElection.leaseName": name})
        wanted = name or "tandem-operator"
        assert f"--lease-name={wanted}" in container(documents)["args"]
        named = [
            rule["resourceNames"]
            for each in documents
            if each["kind"] == "Role"
            for rule in each["rules"]
            if "resourceNames" in rule and "leases" in rule["resources"]
        ]
        assert named
        assert all(names == [wanted] for names in named)


@pytest.mark.parametrize(
    ("values", "end"),
    [
        ({}, ":0.1.0"),
        ({"tag": "2"}, ":2"),
        ({"digest": DIGEST}, f"@{DIGEST}"),
        ({"tag": "2", "digest": DIGEST}, f":2@{DIGEST}"),
    ],
)
def test_an_image_is_named_by_its_tag_or_its_digest(values: dict[str, str], end: str) -> None:
    images = ("image", "images.router", "images.engine")
    made = container(
        render({f"{image}.{part}": value for image in images for part, value in values.items()})
    )
    prefix = "ghcr.io/tandem-inference/tandem"
    assert made["image"] == f"{prefix}-operator{end}"
    assert f"--router-image={prefix}-router{end}" in made["args"]
    assert f"--engine-image={prefix}-engine{end}" in made["args"]


def pod_of(documents: list[Document]) -> Document:
    (deployment,) = (each for each in documents if each["kind"] == "Deployment")
    found: Document = deployment["spec"]["template"]
    return found


def test_operators_prefer_nodes_without_another_one() -> None:
    template = pod_of(render())
    (term,) = template["spec"]["affinity"]["podAntiAffinity"][
        "preferredDuringSchedulingIgnoredDuringExecution"
    ]
    chosen = term["podAffinityTerm"]
    assert chosen["topologyKey"] == "kubernetes.io/hostname"
    assert chosen["labelSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    own: Document = {"podAffinity": {}}
    assert pod_of(render({"affinity": own}))["spec"]["affinity"] == own


def test_the_operator_asks_for_the_storage_that_it_uses() -> None:
    made = container(render())["resources"]
    (tmp,) = pod_of(render())["spec"]["volumes"]
    asked, limit, volume = (
        int(text.removesuffix("Mi"))
        for text in (
            made["requests"]["ephemeral-storage"],
            made["limits"]["ephemeral-storage"],
            tmp["emptyDir"]["sizeLimit"],
        )
    )
    assert volume < asked <= limit


def policy_of(values: dict[str, Any]) -> Document:
    (found,) = (each for each in render(values) if each["kind"] == "NetworkPolicy")
    spec: Document = found["spec"]
    return spec


def test_other_pods_reach_the_metrics_only() -> None:
    spec = policy_of({})
    assert spec["policyTypes"] == ["Ingress"]
    assert spec["ingress"] == [{"ports": [{"port": "metrics", "protocol": "TCP"}]}]
    labels = pod_of(render())["metadata"]["labels"]
    assert spec["podSelector"]["matchLabels"].items() <= labels.items()
    peers: list[Document] = [{"podSelector": {}}]
    assert policy_of({"networkPolicy.metricsFrom": peers})["ingress"][0]["from"] == peers


def test_what_the_operator_reaches_can_be_limited() -> None:
    rules = [{"ports": [{"port": 443, "protocol": "TCP"}]}]
    spec = policy_of({"networkPolicy.egress": rules})
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    assert spec["egress"] == rules


def test_names_of_digits_stay_text() -> None:
    """A namespace may be called 1000, which is a number in YAML."""
    values = {"watchNamespaces": ["2000"], "serviceAccount.name": "3000"}
    for document in render(values, "4000", "1000"):
        texts = [*key_of(document), *document["metadata"].get("labels", {}).values()]
        texts += [name for each in document.get("subjects", []) for name in each.values()]
        assert all(isinstance(text, str) for text in texts), yaml.safe_dump(document)
    assert (CHART / "templates").is_dir()
