"""`tandem serve` ends at any moment, and leaves no process."""

import os
import signal
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator

import pytest
from deadlines import patience

from tandem_cli.serve import Fleet, Stopped
from tandem_local.machine.process import marked

MARK = "TANDEM_TEST_SERVE"
# What `serve` prints on the way up; the empty one stands for the moment after its start.
MOMENTS = ["", '"starting"', "worker: http", "ready: http"]


class Serve:
    """A `tandem serve` with one prefill worker, and its output."""

    def __init__(self) -> None:
        self.mark = uuid.uuid4().hex
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        command = [sys.executable, "-m", "tandem_cli.main", "serve", "mock://tiny"]
        self.process = subprocess.Popen(
            [*command, "--port", port, "--prefill", "1"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {MARK: self.mark},
        )
        self.lines: list[str] = []

    def read_until(self, text: str) -> None:
        """Read lines until one holds the text, or the output ends."""
        assert self.process.stdout is not None
        while text and not any(text in line for line in self.lines):
            line = self.process.stdout.readline()
            assert line, f"no {text!r} in:\n{''.join(self.lines)}"
            self.lines.append(line)

    def close(self) -> None:
        for process in marked(MARK, self.mark):
            process.signal(signal.SIGKILL)
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def serve() -> Iterator[Serve]:
    running = Serve()
    yield running
    running.close()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_at_any_moment_of_the_start_leaves_no_process(
    serve: Serve, moment: str, number: signal.Signals
) -> None:
    serve.read_until(moment)
    serve.process.send_signal(number)
    output, _ = serve.process.communicate()
    assert marked(MARK, serve.mark) == [], output


def test_a_signal_stops_the_next_start_and_the_next_wait() -> None:
    fleet = Fleet()
    fleet.pause()
    fleet.num_signals = 1
    with pytest.raises(Stopped):
        fleet.pause()
    with pytest.raises(Stopped):
        fleet.start(["true"], lambda line: None)
    assert fleet.processes == []


def test_what_a_process_leaves_behind_ends_with_the_fleet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem_cli.serve.STOP_S", 0.5)
    fleet, told, mark = Fleet(), threading.Event(), uuid.uuid4().hex
    script = "trap '' TERM; (sleep 1000; :) & echo started; exit 0"
    fleet.start(["sh", "-c", script], lambda line: told.set(), {MARK: mark})
    assert told.wait(patience(20))
    fleet.stop()
    assert marked(MARK, mark) == []
