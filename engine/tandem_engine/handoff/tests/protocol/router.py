"""What a router and its clients would do: submit, follow the stream, and submit elsewhere."""

from dataclasses import dataclass, field
from typing import Final

from tandem_engine.frames import CoreFailed, CoreRefused, CoreStep, FromCore, RoutedSubmit
from tandem_engine.handoff.tests.protocol.worker import Worker
from tandem_engine.tests.fleet import expected_tokens
from tandem_wire.messages import Cancel, SamplingParams, StepItem, Submit

MAX_ATTEMPTS: Final = 4
"""After so many refusals the client gets the last one."""


class ProtocolViolation(AssertionError):
    """Something happened that must never happen."""


def require(condition: bool, message: str) -> None:
    """Raise ProtocolViolation unless the condition holds."""
    if not condition:
        raise ProtocolViolation(message)


@dataclass
class Chat:
    """One client's request and what it has got so far."""

    number: int
    prompt: list[int]
    params: SamplingParams
    peers: list[str]
    expected: list[int]
    tokens: list[int] = field(default_factory=list)
    worker: Worker | None = None
    rid: str = ""
    num_attempts: int = 0
    end: str = ""
    """How it ended: a finish reason, or `refused: CODE`; empty while it is open."""


class Router:
    """All chats. `living` gives the workers that take requests."""

    def __init__(self) -> None:
        self.chats: list[Chat] = []
        self.living: dict[str, Worker] = {}
        self._by_rid: dict[str, Chat] = {}
        self.num_ends: dict[str, int] = {}

    def open_chats(self) -> list[Chat]:
        return [chat for chat in self.chats if not chat.end]

    def ask(self, prompt: list[int], max_tokens: int, worker: str, peers: list[str]) -> None:
        """A client's request, first sent to `worker`, which may ask `peers` for KV."""
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        expected = expected_tokens(prompt, params, len(prompt))
        chat = Chat(len(self.chats), prompt, params, peers, expected)
        self.chats.append(chat)
        self._submit(chat, worker)

    def _submit(self, chat: Chat, name: str) -> None:
        names = sorted(self.living)
        if name not in self.living:
            name = names[chat.num_attempts % len(names)]
        chat.worker = self.living[name]
        chat.num_attempts += 1
        chat.rid = f"r{chat.number}.{chat.num_attempts}"
        self._by_rid[chat.rid] = chat
        peers = [self.living[peer].peer for peer in chat.peers if peer in self.living]
        chat.worker.core.post(
            RoutedSubmit(
                1,
                Submit(
                    rid=chat.rid,
                    tokens=[*chat.prompt, *chat.tokens],
                    num_prompt_tokens=len(chat.prompt),
                    params=chat.params,
                    prefill=peers,
                ),
            )
        )

    def cancel(self, chat: Chat) -> None:
        """The client leaves."""
        if chat.worker is not None:
            chat.worker.core.post(Cancel(chat.rid))

    def lost(self, worker: Worker) -> None:
        """A worker has died: what it had goes elsewhere, with the tokens streamed so far."""
        for chat in self.open_chats():
            if chat.worker is worker:
                self._move(chat)

    def _move(self, chat: Chat) -> None:
        assert chat.worker is not None
        if len(chat.tokens) == len(chat.expected):
            self._finish(chat, "length")
            return
        others = [name for name in sorted(self.living) if self.living[name] is not chat.worker]
        self._submit(chat, others[chat.num_attempts % len(others)] if others else "")

    # --- what workers say -------------------------------------------------------------------------

    def take(self, worker: Worker, frame: FromCore) -> None:
        """Take a frame of a worker that lives."""
        match frame:
            case CoreStep():
                for routed in frame.routed:
                    for item in routed.items:
                        self._take_item(worker, item)
            case CoreRefused():
                self._refused(frame.refused.rid, frame.refused.code)
            case CoreFailed():
                raise ProtocolViolation(f"{worker.boot_id} failed: {frame.message}")
            case _:
                pass

    def _take_item(self, worker: Worker, item: StepItem) -> None:
        chat = self._by_rid[item.rid]
        require(not chat.end, f"{item.rid} got news after its end")
        require(chat.rid == item.rid, f"{item.rid} got news after it went elsewhere")
        chat.tokens += item.tokens
        require(
            chat.tokens == chat.expected[: len(chat.tokens)],
            f"{item.rid} has the tokens {chat.tokens}, but {chat.expected} are right",
        )
        if item.finish == "moved":
            self._move(chat)
        elif item.finish:
            self._finish(chat, item.finish)

    def _refused(self, rid: str, code: str) -> None:
        chat = self._by_rid[rid]
        require(not chat.end, f"{rid} was refused after its end")
        if chat.num_attempts < MAX_ATTEMPTS and code in ("no_room", "draining"):
            self._move(chat)
        else:
            self._finish(chat, f"refused: {code}")

    def _finish(self, chat: Chat, end: str) -> None:
        if end in ("length", "stop"):
            require(chat.tokens == chat.expected, f"{chat.rid} ended after {chat.tokens}")
        require(end != "error", f"{chat.rid} ended by an error")
        chat.end = end
        self.num_ends[end] = self.num_ends.get(end, 0) + 1
