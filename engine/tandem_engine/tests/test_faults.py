"""What `TANDEM_FAULTS` may say, who may use it, and that every step of it exists."""

import math
from typing import get_args

import pytest

from tandem_engine.config import parse_args
from tandem_engine.errors import ConfigError
from tandem_engine.faults import Clause, FaultPlan, Step, parse_faults
from tandem_engine.handoff.injection import STEPS
from tandem_engine.handoff.settings import HandoffSettings
from tandem_wire.handoff import DataHello, HandoffMessage


def test_a_plan_says_where_what_how_often_and_from_which_seed() -> None:
    text = (
        "commit:corrupt@0.05, pages:delay=0.2@0.1 ,fence:drop@1/20,beat:stall,slots:kill@#3;seed=7"
    )
    assert parse_faults(text) == FaultPlan(
        (
            Clause(step="commit", fault="corrupt", probability=0.05),
            Clause(step="pages", fault="delay", seconds=0.2, probability=0.1),
            Clause(step="fence", fault="drop", every=20),
            Clause(step="beat", fault="stall", seconds=math.inf),
            Clause(step="slots", fault="kill", nth=3),
        ),
        seed=7,
    )


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("comit:drop", "'comit:drop' has no known step: 'comit'; use handshake, prefill,"),
        ("commit:lose", "'commit:lose' has no known fault: 'lose'; use drop, delay,"),
        ("commit", "'commit' has no known fault: ''"),
        ("commit:drop@2", "has the probability 2; use more than 0 and at most 1"),
        ("commit:drop@0", "has '0'; use a rate, such as 0.05, 1/20 or #3"),
        ("commit:drop@", "has an empty rate; write for example @0.05"),
        ("commit:drop@often", "has 'often'; use a rate"),
        ("commit:drop@1/0", "counts to '0'; use a whole number"),
        ("commit:drop@#x", "counts to 'x'; use a whole number"),
        ("commit:drop=3", "gives drop a time; only delay and stall have one"),
        ("commit:delay", "has no time; write for example commit:delay=0.2"),
        ("commit:delay=soon", "has 'soon'; use a time in seconds"),
        ("commit:drop;sed=7", "'sed=7' is not an option; write for example seed=7"),
        ("commit:drop;seed=x", "'seed=x' is not an option"),
        (";seed=7", "names no fault"),
    ],
)
def test_what_makes_no_sense_is_refused_with_what_to_write(text: str, told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_faults(text)
    assert str(refused.value).startswith("TANDEM_FAULTS: ")
    assert told in str(refused.value)


def test_only_a_test_worker_injects_faults() -> None:
    argv = ["--mock", "tiny"]
    assert parse_args(argv, {"TANDEM_FAULTS_ALLOWED": "true"}).faults == ""
    for permit in ("", "false", "True"):
        environ = {"TANDEM_FAULTS": "commit:drop", "TANDEM_FAULTS_ALLOWED": permit}
        with pytest.raises(ConfigError, match=r"label its pod tandem\.dev/fault-injection=true"):
            parse_args(argv, environ)
    environ["TANDEM_FAULTS_ALLOWED"] = "true"
    config = parse_args(argv, environ)
    assert HandoffSettings.from_worker(config).faults == "commit:drop"
    with pytest.raises(ConfigError, match="TANDEM_FAULTS: 'commit:lose'"):
        parse_args(argv, environ | {"TANDEM_FAULTS": "commit:lose"})


def test_every_message_is_a_step_and_every_step_is_something() -> None:
    """A data stream's first frame is no message of a session: its loss is a lost stream."""
    assert set(STEPS) == set(get_args(HandoffMessage)) - {DataHello}
    assert set(STEPS.values()) | {"pages"} == set(get_args(Step))
