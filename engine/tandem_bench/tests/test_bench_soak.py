"""A short soak: real processes, every fault, kills; right answers, and nothing held afterwards."""

import asyncio
from pathlib import Path
from typing import get_args

import pytest

from tandem_bench.errors import EngineError
from tandem_bench.soak.answers import MockBook
from tandem_bench.soak.command import Options, every_fault, soak
from tandem_engine.faults import Fault, Step, parse_faults
from tandem_engine.mock.runner import greedy_answer


def test_the_default_plan_has_every_fault_at_every_step() -> None:
    plan = parse_faults(every_fault(2.0, 11))
    assert plan.seed == 11
    assert {(clause.step, clause.fault) for clause in plan.clauses} == {
        (step, fault) for step in get_args(Step) for fault in get_args(Fault)
    }


def test_questions_come_again_by_their_number_and_differ() -> None:
    book, same = MockBook(7, 40, 8), MockBook(7, 40, 8)
    questions = [book.question(number) for number in range(50)]
    assert questions == [same.question(number) for number in range(50)]
    assert len({question.prompt for question in questions}) > 40
    for question in questions:
        assert book.answer(question) == greedy_answer(question.prompt, question.num_tokens)
        assert len(book.answer(question)) == question.num_tokens


@pytest.mark.parametrize("transfer", ["Auto", "Tcp"])
def test_a_short_soak(tmp_path: Path, transfer: str) -> None:
    """Blows by the clock would hit a slow machine more often; the faults' kills come by count."""
    options = Options(
        requests=150,
        seed=3,
        prefill=1,
        decode=2,
        concurrency=16,
        max_prompt=200,
        max_output=12,
        transfer=transfer,
        lease_seconds=1.0,
        per_mille=6.0,
        blow_seconds=0.0,
    )
    report = asyncio.run(soak(options, tmp_path))
    assert report.failures() == []
    assert report.seen.num_answered == options.requests
    assert report.seen.num_right + report.seen.refused.total() == options.requests
    assert sum(report.faults.values()) > 0


def test_a_fleet_that_cannot_start_says_why_at_once(tmp_path: Path) -> None:
    options = Options(model=f"file://{tmp_path}", prefill=1, decode=1)
    with pytest.raises(EngineError, match="the router can't start: tandem-router: "):
        asyncio.run(soak(options, tmp_path))
