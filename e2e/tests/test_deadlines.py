"""How long tests wait on a free machine and on a busy one."""

import os
import re
import subprocess
from pathlib import Path

import deadlines
import pytest

ROOT = Path(__file__).resolve().parents[2]


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


def test_no_test_waits_by_the_clock_without_patience() -> None:
    raw = re.compile(
        r"asyncio\.timeout\(\d|asyncio\.wait_for\([^\n]*, \d+\)|monotonic\(\) \+ \d+$"
        r"|\.(?:join|wait|settimeout)\((?:timeout=)?\d{2,}"
    )
    listed = subprocess.run(
        ["git", "ls-files", "-z", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found = [
        f"{name}:{number}: {line.strip()}"
        for name in filter(None, listed.stdout.split("\0"))
        if "/tests/" in name
        for number, line in enumerate((ROOT / name).read_text().splitlines(), 1)
        if raw.search(line)
    ]
    assert found == [], "take the limit from deadlines.patience()"
