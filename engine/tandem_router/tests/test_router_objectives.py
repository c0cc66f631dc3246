"""Objectives of the SLO classes on their way to a worker."""

import json

from tandem_router.dispatch.sequence import Sequence
from tandem_router.dispatch.stream import TokenStream
from tandem_router.main import parse_slo_classes
from tandem_router.tests.fake_worker import FakeWorker
from tandem_router.tests.harness import router
from tandem_wire.messages import SamplingParams

CLASSES = parse_slo_classes(
    json.dumps(
        [
            {"name": "interactive", "default": True, "ttftMilliseconds": 60000},
            {"name": "batch", "ttftMilliseconds": 1, "tbtMilliseconds": 1},
        ]
    )
)


async def test_a_worker_learns_the_objectives_of_the_class() -> None:
    worker = FakeWorker()
    async with router(worker, slo_classes=CLASSES) as running:
        for slo_class in ("interactive", "batch"):
            await running.post(
                "/v1/completions", model="mock", prompt="abcd", max_tokens=3, slo_class=slo_class
            )
    interactive, batch = worker.submits
    assert 0.0 < interactive.ttft_seconds < 60.0  # less what the router itself has taken
    assert (interactive.tbt_seconds, batch.tbt_seconds) == (0.0, 0.001)
    assert batch.ttft_seconds == 0.001  # an objective, although it is lost


class _Nowhere:
    """A placer that no one calls."""

    def place(self, sequence: Sequence) -> None:
        raise AssertionError

    finished = place

    def on_failover(self, stage: str) -> None:
        raise AssertionError

    def on_first_token(self, sequence: Sequence, now: float) -> None:
        raise AssertionError

    on_gap = on_first_token


async def test_a_stream_that_goes_on_elsewhere_has_no_first_token_to_come() -> None:
    sequence = Sequence(
        _Nowhere(), TokenStream(), name="s", index=0, prompt=[1, 2],
        params=SamplingParams(max_tokens=5), arrived_at=10.0, ttft_seconds=2.0, tbt_seconds=0.05,
    )  # fmt: skip
    assert sequence.build_submit([], 10.5).ttft_seconds == 1.5
    sequence.output = [3]
    again = sequence.build_submit([], 10.6)
    assert (again.ttft_seconds, again.tbt_seconds) == (0.0, 0.05)
