"""Benchmarks of a fleet's parts, small: hand-off, router, gaps, equal tokens."""

import json
import sys
from functools import partial

import pytest

from tandem_bench.errors import CheckFailedError, EndpointError
from tandem_bench.handoff import loopback, pair
from tandem_bench.router import overhead
from tandem_bench.serve import longest_gap, same_tokens
from tandem_router.tests.fake_worker import FakeWorker, saying
from tandem_router.tests.harness import router


async def test_the_routers_cost_is_measured() -> None:
    options = overhead.Options(
        streams=4, tokens=8, rate=50.0, step_milliseconds=10.0, prompt_characters=3
    )
    result = await overhead.measure(options)
    assert result["router_cpu_us_per_token"] >= 0
    assert set(result["added_ms"]) == {"p50", "p90", "p99"}


def test_the_handoff_is_measured_and_checked(
    capsys: pytest.CaptureFixture[str],
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("UCX_NET_DEVICES", "lo")
    folder = tmp_path_factory.mktemp("shm")
    loopback.run(loopback.Options(megabytes=16, rounds=1, shm_dir=str(folder), only="tcp,nixl"))
    *table, line = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    shares = [share for beside in found for share in beside["shares"]]
    rates = [rate for beside in found for rate in beside["rates"]]
    assert len(table) == len(rates) + len(shares)
    names = {rate["name"] for rate in rates}
    for transport, floor in (
        ("tcp", "raw socket, 2 streams, all memory"),
        ("nixl", "nixl alone, in pieces"),
    ):
        assert names > {transport, f"{transport}, checksum", f"{transport}, checksum, small", floor}
        assert {f"{transport} / {floor}", f"{transport}, checksum / {floor}"} < set(shares)
    assert all(rate["best"] >= rate["median"] > 0 < rate["milliseconds"] for rate in rates)


@pytest.mark.parametrize(
    "transport", ["shm", "mooncake"] if sys.version_info < (3, 14) else ["shm"]
)
def test_what_a_transport_is_measured_beside_moves_its_bytes(transport: str) -> None:
    with loopback.FLOORS[transport](16 << 20) as ways:
        assert all(way() > 0 for way in ways.values())
    told = {
        "shm": {"memory copy, 1 process", "memory copy, 2 processes", "checksum, 1 process"},
        "mooncake": {f"mooncake alone, {way}" for way in ("in pieces", "whole", "its benchmark")},
    }
    assert set(ways) == told[transport]


class ChangedCache(loopback.HostCache):
    """Expects something else than what is sent."""

    def is_right(self) -> bool:
        return not self.kv.cache.any()


def make_changed(side: pair.Side) -> pair.Cache:
    return ChangedCache(side, 4)


def test_kv_that_came_out_changed_is_never_a_rate() -> None:
    with pytest.raises(CheckFailedError, match="tcp: the KV came out changed"):
        pair.measure_handoff("tcp", make_changed, 1, {"transport": "tcp"})


def test_rates_are_those_of_the_best_and_the_middle_round() -> None:
    rate = pair.Rate.of("some", 6_000_000, [3.0, 1.0, 2.0])
    assert (rate.best, rate.median) == (6.0, 3.0)


async def test_the_longest_gap_is_told_per_round(capsys: pytest.CaptureFixture[str]) -> None:
    async with router(FakeWorker(step_seconds=0.001)) as running:
        measure = partial(
            longest_gap.Options, url=running.url, streams=2, context=8, long=64, vocab=250
        )
        await longest_gap.measure_rounds(measure(output=1500, rounds=2))
        lines = capsys.readouterr().out.splitlines()
        told = [line for line in lines if line.startswith("undisturbed")]
        assert len(told) == 2
        assert all("longest gap" in line and "per stream" in line for line in told)
        with pytest.raises(EndpointError, match="ended before all had 100 tokens"):
            await longest_gap.measure_rounds(measure(output=20, rounds=1))


async def test_equal_endpoints_say_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    workers = [FakeWorker(script=saying("always the same")) for _ in range(2)]
    async with router(workers[0]) as one, router(workers[1]) as other:
        ask = partial(same_tokens.Options, url=one.url, other=other.url, lengths="5,70", output=4)
        await same_tokens.compare(ask(vocab=250))
        told = capsys.readouterr().out
        assert "2 prompts one at a time: 2 answers of 4 tokens are equal, 100.00 %" in told
        assert "4 prompts at once: 4 answers" in told
        with pytest.raises(EndpointError, match="HTTP 400"):
            await same_tokens.compare(ask())  # ids that the mock's vocabulary lacks
