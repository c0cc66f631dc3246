"""The protocol's model: no counter-example in many steps."""

import pytest

from tandem_engine.handoff.tests.protocol.machine import ProtocolMachine
from tandem_engine.handoff.tests.protocol.play import describe, play

NUM_WORLDS = 60
SEED = 3
NUM_STEPS = 50_000


@pytest.mark.usefixtures("quiet")
def test_no_order_of_events_breaks_the_protocol(capsys: pytest.CaptureFixture[str]) -> None:
    ProtocolMachine.num_steps = 0
    ProtocolMachine.counts.clear()
    play(NUM_WORLDS, SEED)
    with capsys.disabled():
        print(f"\nthe hand-off's model: {describe()}")
    assert ProtocolMachine.num_steps >= NUM_STEPS
    # Steps in which nothing was at stake prove nothing.
    counts = ProtocolMachine.counts
    for name in (
        'kv_fetches_total{outcome="done"}',
        'kv_fetches_total{outcome="failed"}',
        "kv_fences_total",
        "kv_lost_leases_total",
        "kv_push_failures_total",
        "kv_stale_writes_total",
        "length",
        "cancelled",
    ):
        assert counts[name] >= 5, f"{name}: {counts}"
