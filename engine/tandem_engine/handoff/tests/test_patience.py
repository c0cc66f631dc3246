"""A prompt that waits behind others at a busy prefill worker is not given up."""

import time
from contextlib import ExitStack

from deadlines import patience

from tandem_engine.handoff.events import FetchDone
from tandem_engine.handoff.tests.scripted import make


def test_a_prompt_may_wait_while_others_get_on(stack: ExitStack) -> None:
    """Far longer than a stall, while the worker computes other prompts, for another peer too."""
    stall, heartbeat = patience(1.0), patience(0.1)
    p = make(stack, "p", heartbeat_seconds=heartbeat)
    d = make(stack, "d", heartbeat_seconds=heartbeat, stall_seconds=stall)
    other = make(stack, "other", heartbeat_seconds=heartbeat)
    d.fetch("patient", [p])
    patient = p.arrived()
    end = time.monotonic() + 2.5 * stall
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
