"""The protocol's model: no counter-example in many steps, and every planted bug is found."""

import logging
from collections.abc import Iterator

import pytest

from tandem_engine.errors import CorruptKVError
from tandem_engine.handoff.tests.protocol import planted
from tandem_engine.handoff.tests.protocol.machine import ProtocolMachine
from tandem_engine.handoff.tests.protocol.play import describe, play
from tandem_engine.handoff.tests.protocol.router import ProtocolViolation

NUM_WORLDS = 60
SEED = 1
NUM_STEPS = 50_000
FEW_WORLDS = 40
MANY_SEEDS = 8
"""The first seed finds a bug early, until another release of hypothesis draws in another way."""


@pytest.fixture(autouse=True)
def quiet_fixture() -> Iterator[None]:
    """Thousands of lost connections are no news here."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


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


FINDS = {
    planted.pages_freed_before_the_fence_is_acknowledged: (2, "which is over"),
    planted.epoch_not_bumped_on_retry: (3, "an earlier attempt of the same number"),
    planted.commit_not_checked_for_its_tokens: (4, "has the tokens"),
    planted.stale_write_not_dropped: (2, "which is over"),
    planted.write_that_is_being_made_not_waited_for: (2, "which is over"),
    planted.lease_kept_after_connection_loss: (1, "has outlived its owner"),
    planted.fence_answered_while_a_write_is_under_way: (2, "are not pinned|which is over"),
    planted.second_fence_not_waiting_for_the_first: (2, "are not pinned|which is over"),
    planted.drop_cut_short_by_the_end_of_its_session: (1, "has outlived its owner|left over"),
}
"""By which seed a bug is found early, and how it shows."""


def look_for_it(seed: int) -> None:
    for number in range(MANY_SEEDS):
        play(FEW_WORLDS, seed + number)


@pytest.mark.parametrize("plant", planted.PLANTED, ids=lambda plant: plant.__name__)
def test_a_planted_bug_is_found(plant: planted.Plant) -> None:
    seed, message = FINDS[plant]
    with plant(), pytest.raises((ProtocolViolation, CorruptKVError), match=message):
        look_for_it(seed)
