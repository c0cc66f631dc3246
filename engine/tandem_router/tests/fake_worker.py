"""A small worker: it speaks the wire protocol and says what the test wants."""

import asyncio
import contextlib
import uuid
from collections.abc import Callable
from typing import Literal

import msgspec

from tandem_wire.connection import Connection
from tandem_wire.endpoint import Listener, listen
from tandem_wire.errors import WireError
from tandem_wire.messages import (
    Cancel,
    FinishReason,
    Hello,
    KvEvents,
    Ping,
    Pong,
    Refused,
    Role,
    RouterMessage,
    Step,
    StepItem,
    Submit,
    TokenLogprobs,
    Welcome,
    WorkerState,
)

EOS = 257
Script = Callable[[Submit, int], int]
"""The token at an output position; depends on prompt and seed alone, as a real worker's does."""


def counting(submit: Submit, position: int) -> int:
    """Letters that depend on the seed, the prompt's length and the position."""
    return ord("a") + (submit.params.seed + submit.num_prompt_tokens + position) % 26


def saying(text: str | bytes) -> Script:
    """These bytes, then the end of the sequence."""
    data = text.encode() if isinstance(text, str) else text
    return lambda _, position: data[position] if position < len(data) else EOS


class FakeWorker:
    """Listens on a free port of 127.0.0.1; a test drives it through its attributes."""

    def __init__(
        self,
        name: str = "d0",
        *,
        role: Role = "both",
        script: Script = counting,
        model: str = "mock",
        compatibility_hash: str = "same",
        max_model_len: int = 4096,
        step_seconds: float = 0.0,
    ) -> None:
        self.name = name
        self.role: Role = role
        self.script = script
        self.model = model
        self.compatibility_hash = compatibility_hash
        self.max_model_len = max_model_len
        self.step_seconds = step_seconds
        self.boot_id = uuid.uuid4().hex
        self.draining = False
        self.refusal: Refused | None = None  # given to every submit
        self.hold_after: int | None = None  # say no more after so many output tokens
        self.finish_at: tuple[int, FinishReason] | None = None  # output position of every request
        self.tokens_per_step = 1
        self.vocab_size = 512
        self.scores_prompts = True
        self.likely: dict[int, float] = {}  # logprobs of every position; empty: made up
        self.page_size = 4
        self.submits: list[Submit] = []
        self.cancelled: list[str] = []
        self.answers_pings = True
        self.refuse_hello: Refused | None = None
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._connections: set[Connection[RouterMessage]] = set()
        self._listener: Listener[RouterMessage] | None = None
        self.port = 0
        self.changed = asyncio.Condition()

    @property
    def address(self) -> str:
        """HOST:PORT as for --worker."""
        return f"127.0.0.1:{self.port}"

    async def start(self) -> "FakeWorker":
        """Open the port: a free one the first time, the same one after `die`."""
        decoder: msgspec.msgpack.Decoder[RouterMessage] = msgspec.msgpack.Decoder(RouterMessage)
        self._listener = await listen("127.0.0.1", self.port, decoder, self._serve)
        self.port = self._listener.port
        return self

    async def die(self) -> None:
        """Be gone as after kill -9: connections reset, nothing said."""
        assert self._listener is not None
        self._listener.stop_accepting()
        for task in self._tasks.values():
            task.cancel()
        self._tasks.clear()
        for connection in list(self._connections):
            connection.abort()
            await connection.wait_closed()
        self.boot_id = uuid.uuid4().hex

    def tell_state(self, **fields: float) -> None:
        """Send a WorkerState now."""
        for connection in self._connections:
            connection.send(self._state(**fields))

    def tell(self, events: KvEvents) -> None:
        """Send KV events now."""
        for connection in self._connections:
            connection.send(events)

    def _state(self, **fields: float) -> WorkerState:
        state = WorkerState(
            role=self.role,
            draining=self.draining,
            num_running=len(self._tasks),
            num_free_blocks=1000,
            num_blocks=1000,
        )
        return msgspec.structs.replace(state, **fields)

    async def _serve(self, connection: Connection[RouterMessage]) -> None:
        self._connections.add(connection)
        try:
            hello = await connection.receive()
            assert isinstance(hello, Hello)
            if self.refuse_hello is not None:
                connection.send(self.refuse_hello)
                await connection.drain()
                return
            connection.send(self._welcome())
            connection.send(self._state())
            async for message in connection:
                await self._handle(connection, message)
        finally:
            self._connections.discard(connection)

    def _welcome(self) -> Welcome:
        return Welcome(
            worker_id=self.name,
            boot_id=self.boot_id,
            role=self.role,
            model=self.model,
            compatibility_hash=self.compatibility_hash,
            max_model_len=self.max_model_len,
            page_size=self.page_size,
            num_blocks=1000,
            vocab_size=self.vocab_size,
            eos_token_ids=[EOS],
            bootstrap_host="127.0.0.1",
            bootstrap_port=8998,
        )

    async def _handle(self, connection: Connection[RouterMessage], message: RouterMessage) -> None:
        if isinstance(message, Ping):
            if self.answers_pings:
                connection.send(Pong(message.number))
        elif isinstance(message, Submit):
            self.submits.append(message)
            if self.refusal is not None:
                connection.send(msgspec.structs.replace(self.refusal, rid=message.rid))
            else:
                task = asyncio.create_task(self._run(connection, message))
                self._tasks[message.rid] = task
        elif isinstance(message, Cancel):
            self.cancelled.append(message.rid)
            task_ = self._tasks.pop(message.rid, None)
            if task_ is not None:
                task_.cancel()
        async with self.changed:
            self.changed.notify_all()

    async def _run(self, connection: Connection[RouterMessage], submit: Submit) -> None:
        position = len(submit.tokens) - submit.num_prompt_tokens
        self._score(connection, submit)
        is_first = True
        finish: FinishReason | Literal[""] = ""
        with contextlib.suppress(WireError):
            while not finish:
                await asyncio.sleep(self.step_seconds)
                if self.hold_after is not None and position >= self.hold_after:
                    await asyncio.Event().wait()
                tokens: list[int] = []
                while len(tokens) < self.tokens_per_step and not finish:
                    tokens.append(self.script(submit, position))
                    position += 1
                    finish = self._finish(submit, tokens[-1], position)
                connection.send(Step([self._item(submit, tokens, finish, is_first)]))
                is_first = False
        self._tasks.pop(submit.rid, None)

    def _score(self, connection: Connection[RouterMessage], submit: Submit) -> None:
        """Logprobs of the prompt in pieces of three tokens, as from the chunks of a prefill."""
        count = submit.params.prompt_logprobs
        if count is None or not self.scores_prompts:
            return
        prompt = submit.tokens[1 : submit.num_prompt_tokens]
        for start in range(0, len(prompt), 3):
            scores = [
                TokenLogprobs(-token / 64, [9, 10][:count], [-9 / 64, -10 / 64][:count])
                for token in prompt[start : start + 3]
            ]
            connection.send(Step([StepItem(submit.rid, [], prompt_logprobs=scores)]))

    def _finish(self, submit: Submit, token: int, position: int) -> FinishReason | Literal[""]:
        if token == EOS and not submit.params.ignore_eos:
            return "stop"
        if token in submit.params.stop_token_ids:
            return "stop"
        if self.finish_at is not None and position >= self.finish_at[0]:
            return self.finish_at[1]
        return "length" if position >= submit.params.max_tokens else ""

    def _logprobs(self, token: int, count: int) -> TokenLogprobs:
        if not self.likely:
            return TokenLogprobs(-0.5, [token, *range(count)][:count], [-0.5] * count)
        best = sorted(self.likely.items(), key=lambda entry: -entry[1])[:count]
        return TokenLogprobs(
            self.likely[token], [token for token, _ in best], [logprob for _, logprob in best]
        )

    def _item(
        self, submit: Submit, tokens: list[int], finish: FinishReason | Literal[""], is_first: bool
    ) -> StepItem:
        logprobs = None
        if submit.params.logprobs is not None:
            logprobs = [self._logprobs(token, submit.params.logprobs) for token in tokens]
        return StepItem(
            submit.rid,
            tokens,
            finish,
            logprobs,
            num_cached_tokens=3 if is_first else 0,
            prefill_worker=submit.prefill[0].worker_id if submit.prefill and is_first else "",
            kv_bytes=1024 if submit.prefill and is_first else 0,
            error="out of luck" if finish == "error" else "",
        )
