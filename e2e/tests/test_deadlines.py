"""How long tests wait on a free machine and on a busy one."""

import os

import deadlines
import pytest


@pytest.mark.parametrize(
    ("running", "factor"),
    [(0.0, 2.0), (1.0, 2.0), (3.0, 6.0), (1000.0, deadlines.LIMIT)],
)
def test_a_limit_grows_with_what_wants_to_run_on_each_core(
    running: float, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deadlines, "_load", lambda: running * (os.cpu_count() or 1))
    assert deadlines.patience(30.0) == pytest.approx(30.0 * factor)


def test_the_load_is_what_the_machine_says() -> None:
    assert deadlines._load() >= 1.0, "this test itself wants to run"
