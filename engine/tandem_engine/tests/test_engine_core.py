"""The core's loop over mock runners: tokens, hand-off, ends, modes."""

from tandem_engine.tests.fleet import Fleet, expected_tokens
from tandem_wire.messages import SamplingParams

GREEDY = {"temperature": 0.0, "max_tokens": 8}


def prompt(length: int, start: int = 0) -> list[int]:
    return [32 + (start + i * 7) % 95 for i in range(length)]


def test_one_request_is_prefilled_and_decoded() -> None:
    fleet = Fleet("a")
    fleet["a"].submit("r", prompt(100))
    fleet.settle()
    stream = fleet["a"].streams["r"]
    assert stream.ends == ["length"]
    assert stream.tokens == expected_tokens(prompt(100), SamplingParams(**GREEDY), 100)
    ledger = fleet["a"].stats().ledger
    assert ledger["owned"] == ledger["leased"] == ledger["leaked"] == 0


def test_long_prompt_is_fetched_from_a_prefill_worker() -> None:
    fleet = Fleet("d", "p")
    fleet["d"].submit("r", prompt(100), peers=("p",))
    fleet.settle()
    stream = fleet["d"].streams["r"]
    assert stream.tokens == expected_tokens(prompt(100), SamplingParams(**GREEDY), 100)
    assert stream.items[0].prefill_worker == "p"
    assert stream.items[0].kv_bytes == 13 * fleet["d"].runner.kv.layout.block_bytes
    for name in "dp":
        ledger = fleet[name].stats().ledger
        assert ledger["owned"] == ledger["leased"] == ledger["leaked"] == 0
