"""One OpenAI endpoint: which model it has, what prompts it takes, and one streamed completion."""

import contextlib
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Final

import aiohttp
import msgspec

from tandem_bench.errors import EndpointError
from tandem_bench.record import RequestRecord, clock
from tandem_bench.serve.events import Choice, Chunk, EventParser
from tandem_bench.workload.prompts import FIRST_TOKEN, PromptKind

KEEP_ALIVE_SECONDS: Final = 2.0
"""Idle connections are dropped before the usual servers do (uvicorn: 5 s), or a request that
meets a closing connection would count as the endpoint's error."""
CONNECT_SECONDS: Final = 30.0
VOCABULARIES: Final = (10000, 512, 250)
"""Sizes to try: nano-vllm's, the mock's, bytes."""
_DONE: Final = b"[DONE]"


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model] = []


@dataclass(frozen=True, slots=True)
class Prompts:
    """What the endpoint takes as a prompt."""

    kind: PromptKind
    vocab_size: int


def base_url(url: str) -> str:
    """Without trailing slash and `/v1`; `http://` where no scheme is given."""
    found = url.rstrip("/").removesuffix("/v1").rstrip("/")
    return found if "://" in found else f"http://{found}"


class Endpoint:
    """Sends every request of a benchmark to one endpoint."""

    def __init__(self, session: aiohttp.ClientSession, url: str, model: str = "") -> None:
        self.url = base_url(url)
        self.model = model
        self._session = session
        self._completions = f"{self.url}/v1/completions"
        self._decoder = msgspec.json.Decoder(Chunk)

    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls, url: str, model: str = "", api_key: str = "", timeout: float = 600.0
    ) -> AsyncIterator["Endpoint"]:
        """With a connection pool of its own. `timeout` in seconds for a whole request."""
        headers = {"content-type": "application/json"}
        if key := api_key or os.environ.get("OPENAI_API_KEY", ""):
            headers["authorization"] = f"Bearer {key}"
        connector = aiohttp.TCPConnector(
            limit=0, keepalive_timeout=KEEP_ALIVE_SECONDS, ttl_dns_cache=None
        )
        limits = aiohttp.ClientTimeout(total=timeout, sock_connect=CONNECT_SECONDS)
        async with aiohttp.ClientSession(
            connector=connector, timeout=limits, headers=headers, read_bufsize=1 << 18
        ) as session:
            yield cls(session, url, model)

    async def discover(self) -> str:
        """The model to ask for: the one given, or the first of `/v1/models`."""
        if self.model:
            return self.model
        try:
            async with self._session.get(f"{self.url}/v1/models") as response:
                if response.status != 200:
                    raise EndpointError(
                        f"{self.url}/v1/models answered {response.status}",
                        "check --url, or name the model with --model",
                    )
                models = msgspec.json.decode(await response.read(), type=_Models)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise EndpointError(
                f"{self.url} can't be reached: {error or type(error).__name__}",
                "start it first, for example with `tandem serve MODEL`, or check --url",
            ) from error
        except msgspec.DecodeError as error:
            raise EndpointError(f"{self.url}/v1/models: {error}", "check --url") from error
        if not models.data:
            raise EndpointError(f"{self.url} serves no model", "name one with --model")
        self.model = models.data[0].id
        return self.model

    def body(self, prompt: list[int] | str, output_tokens: int, extra: dict[str, Any]) -> bytes:
        """A request, ready to send."""
        return msgspec.json.encode(
            {
                "model": self.model,
                "prompt": prompt,
                "max_tokens": output_tokens,
                "stream": True,
                "stream_options": {"include_usage": True},
                **extra,
            }
        )

    async def choose_prompts(self, extra: dict[str, Any], vocab_size: int = 0) -> Prompts:
        """Token ids where the endpoint takes them, else text.

        The largest of a few vocabularies whose last id is accepted is used, unless given. Raises
        EndpointError when not even text is answered.
        """
        for size in (vocab_size,) if vocab_size else VOCABULARIES:
            if not await self._probe([FIRST_TOKEN, size - 1], extra):
                return Prompts("ids", size)
        if error := await self._probe("the", extra):
            raise EndpointError(
                f"{self._completions} didn't answer a short completion: {error}",
                "check --url, --model and the options that go with every request",
            )
        return Prompts("text", 1 << 16)

    async def _probe(self, prompt: list[int] | str, extra: dict[str, Any]) -> str:
        record = RequestRecord(-1, 0.0, requested_output=1)
        await self.stream(self.body(prompt, 1, extra), record, clock())
        # A single token may be the end of the sequence: an empty answer is an answer.
        return "" if record.error in ("", "no tokens") else f"{record.error}: {record.detail}"

    async def stream(
        self,
        body: bytes,
        record: RequestRecord,
        start: float,
        on_pieces: Callable[[int], None] = lambda _: None,
        on_choice: Callable[[Choice], None] | None = None,
    ) -> None:
        """Send one request and fill its record; never raises what the endpoint is to blame for.

        `on_pieces` is told how many pieces arrived together, `on_choice` what each of them held.
        """
        record.sent = clock() - start
        try:
            async with self._session.post(self._completions, data=body) as response:
                if response.status != 200:
                    record.error = f"HTTP {response.status}"
                    record.detail = (await response.content.read(2000)).decode(errors="replace")
                else:
                    await self._read(response, record, start, on_pieces, on_choice)
        except TimeoutError as error:
            record.error = "timeout"
            record.detail = str(error) or type(error).__name__
        except aiohttp.ClientConnectorError as error:
            record.error, record.detail = "no connection", str(error)
        except (aiohttp.ClientError, OSError) as error:
            record.error = "broken stream" if record.times else "broken connection"
            record.detail = str(error) or type(error).__name__
        except msgspec.DecodeError as error:
            record.error, record.detail = "malformed event", str(error)
        finally:
            record.ended = clock() - start

    async def _read(
        self,
        response: aiohttp.ClientResponse,
        record: RequestRecord,
        start: float,
        on_pieces: Callable[[int], None],
        on_choice: Callable[[Choice], None] | None,
    ) -> None:
        parser, decode, times = EventParser(), self._decoder.decode, record.times
        done = False
        while data := await response.content.readany():
            now = clock() - start
            pieces = 0
            for event in parser.feed(data):
                if event == _DONE:
                    done = True
                    continue
                chunk = decode(event)
                if chunk.error is not None or chunk.object == "error":
                    record.error = "error event"
                    record.detail = event[:2000].decode(errors="replace")
                    return
                for choice in chunk.choices:
                    if choice.text or choice.token_ids:
                        times.append(now)
                        pieces += 1
                        if on_choice is not None:
                            on_choice(choice)
                if chunk.usage is not None:
                    _take_usage(record, chunk)
            if pieces:
                on_pieces(pieces)
        record.output_tokens = record.output_tokens or len(times)
        if not done:
            record.error = "broken stream"
            record.detail = f"ended without [DONE] after {len(times)} pieces"
        elif not times:
            record.error = "no tokens"


def _take_usage(record: RequestRecord, chunk: Chunk) -> None:
    usage = chunk.usage
    assert usage is not None
    record.input_tokens = usage.prompt_tokens or record.input_tokens
    record.output_tokens = usage.completion_tokens or record.output_tokens
    if usage.prompt_tokens_details is not None:
        record.cached_tokens = usage.prompt_tokens_details.cached_tokens or 0
