"""The protocol's model finds every bug that is planted into the real code."""

import pytest

from tandem_engine.errors import CorruptKVError
from tandem_engine.handoff.tests.protocol import planted
from tandem_engine.handoff.tests.protocol.play import play
from tandem_engine.handoff.tests.protocol.router import ProtocolViolation

FEW_WORLDS = 40
MANY_SEEDS = 8
"""The first seed finds a bug early, until another release of hypothesis draws in another way."""

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


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("plant", planted.PLANTED, ids=lambda plant: plant.__name__)
def test_a_planted_bug_is_found(plant: planted.Plant) -> None:
    seed, message = FINDS[plant]
    with plant(), pytest.raises((ProtocolViolation, CorruptKVError), match=message):
        look_for_it(seed)
