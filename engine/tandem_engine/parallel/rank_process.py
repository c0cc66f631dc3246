"""One rank's process, as the first rank sees it."""

import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from typing import Final

import msgspec

from tandem_engine.errors import RankDiedError
from tandem_engine.frames import pack_frame, read_frame
from tandem_engine.parallel.messages import PageReply, PageRequest, RankReady, RankStart

_KEPT_LINES: Final = 12
"""Last lines of a rank's log that are reported when it dies."""
_DRAIN_SECONDS: Final = 1.0


class RankProcess:
    """A rank in a process of its own, which ends when this one does, however this one ends.

    Args:
        module: what it runs. Its arguments are file descriptors: three connections (steps, exports,
            imports), then `descriptors`.
        start: the first frame to it.
        descriptors: files that it shares, by number.
        on_death: called from another thread when it has ended, with the report and the exit code.
    """

    def __init__(
        self,
        module: str,
        start: RankStart,
        descriptors: list[int],
        on_death: Callable[[str, int], None],
    ) -> None:
        self.rank = start.rank
        self._name = f"rank {start.rank} of {start.config.tensor_parallel}"
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        pairs = [socket.socketpair() for _ in range(3)]
        self.steps, self.exports, self.imports = (ours for ours, _ in pairs)
        passed = [theirs.fileno() for _, theirs in pairs] + descriptors
        command = [sys.executable, "-m", module, *map(str, passed)]
        try:
            self._process = subprocess.Popen(
                command, pass_fds=passed, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
        finally:
            for _, theirs in pairs:
                theirs.close()
        self._reader = threading.Thread(target=self._read_log, name="rank-log", daemon=True)
        self._reader.start()
        watcher = threading.Thread(target=self._watch, args=(on_death,), name="rank", daemon=True)
        watcher.start()
        self.send(pack_frame(msgspec.msgpack.encode(start)))

    @property
    def pid(self) -> int:
        """Process id of the rank."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether the process is running."""
        return self._process.poll() is None

    def send(self, frame: bytes) -> None:
        """Send a step's frame. Raises RankDiedError."""
        self._send(self.steps, frame)

    def wait_ready(self) -> RankReady:
        """Wait for the rank's answer to its start. Raises RankDiedError."""
        return msgspec.msgpack.decode(self._receive(self.steps), type=RankReady)

    def ask(self, connection: socket.socket, request: PageRequest) -> None:
        """Send a request on `exports` or `imports`; `answer` waits for its reply."""
        self._send(connection, pack_frame(msgspec.msgpack.encode(request)))

    def answer(self, connection: socket.socket) -> None:
        """Wait for the reply to the last request. Raises RankDiedError if it failed."""
        reply = msgspec.msgpack.decode(self._receive(connection), type=PageReply)
        if reply.error:
            raise RankDiedError(f"{self._name} failed to move pages: {reply.error}")

    def _send(self, connection: socket.socket, frame: bytes) -> None:
        try:
            connection.sendall(frame)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise RankDiedError(f"{self._name} has closed its connection") from error

    def _receive(self, connection: socket.socket) -> bytes:
        payload = read_frame(connection)
        if payload is None:
            raise RankDiedError(f"{self._name} has closed its connection")
        return payload

    def _read_log(self) -> None:
        stream = self._process.stderr
        assert stream is not None
        with stream:
            for line in stream:
                text = line.decode(errors="replace").rstrip()
                self._lines.append(text)
                sys.stderr.write(f"[{self._name}] {text}\n")

    def _watch(self, on_death: Callable[[str, int], None]) -> None:
        code = self._process.wait()
        self._reader.join(_DRAIN_SECONDS)
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        lines = "\n".join(self._lines)
        on_death(f"{self._name} ended ({how}); its last log lines:\n{lines}", code)

    def close(self, grace_seconds: float) -> None:
        """Wait for the process to end, and kill it after the grace period."""
        try:
            self._process.wait(grace_seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(_DRAIN_SECONDS)
        for connection in (self.steps, self.exports, self.imports):
            connection.close()
