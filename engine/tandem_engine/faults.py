"""Faults that a test worker injects into its own side of the hand-off: what `TANDEM_FAULTS` says.

    TANDEM_FAULTS = clause{,clause}[;seed=N]
    clause        = step:fault[=SECONDS][@rate]
    rate          = 0.05 (a probability) | 1/20 (every 20th time) | #3 (the third time alone)

For example `commit:corrupt@0.05,pages:delay=0.2@0.1,fence:drop@1/20;seed=7`. Without a rate a
fault comes every time. A fault strikes where its worker sends: set the variable at the decode
worker for `prefill` and `fence`, at the prefill worker for `pages`, `commit` and `fenced`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, cast, get_args

from tandem_engine.errors import ConfigError

Step = Literal[
    "handshake",  # of either side
    "prefill",  # D asks for KV
    "pages",  # P's write of pages, over whatever transport
    "slots",  # a slot of a ring is full (P), or free again (D)
    "chunk",  # P has pushed a chunk
    "commit",  # P has pushed everything
    "refusal",  # P will not deliver
    "fence",  # D gives an epoch up
    "fenced",  # P has stopped writing
    "probe",  # D asks for a pattern
    "beat",  # of either side
]
"""A step of the hand-off's protocol: a message, or a write of pages."""

Fault = Literal[
    "drop",  # it is not sent
    "delay",  # it, and all that comes behind it, is sent later
    "duplicate",  # it is sent twice
    "corrupt",  # one bit of it changes
    "truncate",  # its second half is not sent; a connection ends there
    "half-close",  # it is not sent, and nothing any more, but what comes is still read
    "stall",  # it is not sent, and nothing behind it, but the connection stays open
    "kill",  # the core process gets SIGKILL
]

VARIABLE: Final = "TANDEM_FAULTS"
PERMIT: Final = "TANDEM_FAULTS_ALLOWED"
LABEL: Final = "tandem.dev/fault-injection"
"""The pod's label that the operator gives to the worker as `PERMIT`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Clause:
    """One kind of fault at one step. `nth` and `every` are 0 unless the rate counts."""

    step: Step
    fault: Fault
    seconds: float = math.inf
    probability: float = 1.0
    every: int = 0
    nth: int = 0


@dataclass(frozen=True, slots=True)
class FaultPlan:
    """All of them. The same seed gives each worker the same faults at the same times it acts."""

    clauses: tuple[Clause, ...]
    seed: int = 0


def read_faults(environ: Mapping[str, str]) -> str:
    """What `TANDEM_FAULTS` asks for; empty: nothing.

    Raises ConfigError when it makes no sense, or when this worker may not inject faults.
    """
    text = environ.get("TANDEM_FAULTS", "").strip()
    if not text:
        return ""
    parse_faults(text)
    if environ.get("TANDEM_FAULTS_ALLOWED", "") != "true":
        raise ConfigError(
            f"{VARIABLE} is set, but this is no test worker: label its pod {LABEL}=true "
            f"(podTemplate.metadata.labels), or, outside Kubernetes, set {PERMIT}=true; "
            f"else unset {VARIABLE}"
        )
    return text


def parse_faults(text: str) -> FaultPlan:
    """The plan that a text describes. Raises ConfigError."""
    listed, *options = text.split(";")
    seed = 0
    for option in options:
        name, _, value = option.strip().partition("=")
        if name != "seed" or not value.isdecimal():
            raise _wrong(option, "is not an option", "write for example seed=7")
        seed = int(value)
    clauses = tuple(_parse_clause(part.strip()) for part in listed.split(",") if part.strip())
    if not clauses:
        raise _wrong(text, "names no fault", "write for example commit:drop@0.1")
    return FaultPlan(clauses, seed)


def _parse_clause(text: str) -> Clause:
    body, at, rate = text.partition("@")
    step, _, rest = body.partition(":")
    fault, has_value, value = rest.partition("=")
    if step not in get_args(Step):
        raise _wrong(text, f"has no known step: {step!r}", f"use {_list(Step)}")
    if fault not in get_args(Fault):
        raise _wrong(text, f"has no known fault: {fault!r}", f"use {_list(Fault)}")
    if at and not rate:
        raise _wrong(text, "has an empty rate", "write for example @0.05, @1/20 or @#3")
    seconds = math.inf
    if has_value:
        if fault not in ("delay", "stall"):
            raise _wrong(text, f"gives {fault} a time", "only delay and stall have one")
        seconds = _number(text, value, "a time in seconds, such as 0.2")
    elif fault == "delay":
        raise _wrong(text, "has no time", f"write for example {step}:delay=0.2")
    return Clause(
        step=cast(Step, step),
        fault=cast(Fault, fault),
        seconds=seconds,
        **_parse_rate(text, rate),
    )


def _parse_rate(text: str, rate: str) -> dict[str, int]:
    """The keywords of a clause that say how often; a probability is a float."""
    if not rate:
        return {}
    if rate.startswith("#"):
        return {"nth": _count(text, rate[1:])}
    if rate.startswith("1/"):
        return {"every": _count(text, rate[2:])}
    probability = _number(text, rate, "a rate, such as 0.05, 1/20 or #3")
    if probability > 1:
        raise _wrong(text, f"has the probability {rate}", "use more than 0 and at most 1")
    return cast(dict[str, int], {"probability": probability})


def _count(text: str, value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise _wrong(text, f"counts to {value!r}", "use a whole number from 1 on")
    return int(value)


def _number(text: str, value: str, what: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise _wrong(text, f"has {value!r}", f"use {what}")
    return number


def _list(names: object) -> str:
    *most, last = get_args(names)
    return f"{', '.join(most)} or {last}"


def _wrong(part: str, problem: str, remedy: str) -> ConfigError:
    return ConfigError(f"{VARIABLE}: {part.strip()!r} {problem}; {remedy}")
