"""A prompt that waits behind others at a busy prefill worker is not given up."""

import time
from contextlib import ExitStack

from tandem_engine.handoff.events import FetchDone
from tandem_engine.handoff.tests.scripted import make

STALL = 2.0


def test_a_prompt_may_wait_while_others_get_on(stack: ExitStack) -> None:
    """Far longer than a stall, while the worker computes other prompts, for another peer too."""
    p = make(stack, "p", heartbeat_seconds=0.1)
    d = make(stack, "d", heartbeat_seconds=0.1, stall_seconds=STALL)
    other = make(stack, "other", heartbeat_seconds=0.1)
    d.fetch("patient", [p])
    patient = p.arrived()
    end = time.monotonic() + 2.5 * STALL
    number = 0
    while time.monotonic() < end:
        number += 1
        other.fetch(f"r{number}", [p])
        p.push(p.arrived())
        assert isinstance(other.outcome(f"r{number}"), FetchDone)
    p.push(patient)
    done = d.outcome("patient")
    assert isinstance(done, FetchDone), done
    assert "kv_attempt_failures_total" not in d.handoff.counters()
