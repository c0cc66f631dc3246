"""The benchmark runs and checks what it moves."""

import sys

import pytest

from tandem_engine.handoff import bench


def test_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "--megabytes", "16", "--rounds", "1"])
    rates = {"tcp": bench.measure_handoff("tcp", 8 << 20, 1, transfer="tcp")}
    assert rates["tcp"].best > 0
    monkeypatch.setattr(bench, "measure_handoff", lambda name, *_, **__: bench.Rate(name, 1.0, 1.0))
    bench.main()
    assert "raw socket, 2 stream(s)" in capsys.readouterr().out
