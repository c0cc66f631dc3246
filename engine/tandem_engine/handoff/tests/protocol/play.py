"""Plays the machine; `make model` plays it for as long as one likes."""

import logging
import random
import sys
from typing import Final
from unittest import mock

import hypothesis
from hypothesis import HealthCheck, Phase
from hypothesis.internal.conjecture.providers import HypothesisProvider
from hypothesis.stateful import run_state_machine_as_test

from tandem_engine.handoff.tests.protocol.machine import ProtocolMachine

RULES: Final = 40
"""Rules that are played in a world."""


def play(num_worlds: int, seed: int, *, shrink: bool = False) -> None:
    """Play so many worlds; raises what the machine finds. The same seed plays the same worlds.

    With `shrink` what is found is made smaller first, which takes minutes.
    """
    phases = [Phase.generate, Phase.shrink] if shrink else [Phase.generate]
    settings = hypothesis.settings(
        max_examples=num_worlds,
        stateful_step_count=RULES,
        phases=phases,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    machine = hypothesis.seed(seed)(type("Machine", (ProtocolMachine,), {}))
    # Hypothesis also draws numbers that stand in whatever modules are loaded: with other tests
    # beside this one, or after an edit elsewhere, a seed would play other worlds.
    with mock.patch.object(HypothesisProvider, "_maybe_draw_constant", return_value=None):
        run_state_machine_as_test(machine, settings=settings)


def describe() -> str:
    """What the worlds came to so far."""
    counts = ProtocolMachine.counts
    found = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    return f"{ProtocolMachine.num_steps} steps: {found}"


def main() -> None:
    """Play worlds that no one has seen yet, or those of a seed."""
    logging.disable(logging.WARNING)
    num_worlds = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(1 << 32)
    print(f"{num_worlds} worlds of seed {seed}", flush=True)
    play(num_worlds, seed, shrink=True)
    print(describe())


if __name__ == "__main__":
    main()
