"""The longest gap that running streams see while a long prompt arrives, at any OpenAI endpoint.

Streams that decode are watched before and while one long prompt is computed; prompts are random
token ids, so nothing is cached. The first round isn't printed: it compiles what is left to compile.
"""

import asyncio
import itertools
import random
import statistics
from dataclasses import dataclass, field
from typing import Final

from tandem_bench.errors import EndpointError
from tandem_bench.options import option
from tandem_bench.record import RequestRecord, clock
from tandem_bench.serve.endpoint import Endpoint

TOKENS_BEFORE: Final = 100
TIMEOUT_SECONDS: Final = 3600.0
EXTRA: Final = {"temperature": 0, "ignore_eos": True}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The longest gap that running streams see while a long prompt arrives."""

    url: str = option("http://127.0.0.1:8000", "Any OpenAI endpoint that takes token ids.")
    streams: int = option(32, "Streams that decode meanwhile.", minimum=1)
    context: int = option(1024, "Tokens of their prompts.")
    output: int = option(1500, "Tokens that they may generate.")
    long: int = option(8192, "Tokens of the prompt that arrives.")
    rounds: int = option(3, "Measured rounds.", minimum=1)
    vocab: int = option(100_000, "Token ids are below this.")


@dataclass(slots=True)
class Stream:
    """One answer: `warm` is set once `TOKENS_BEFORE` of its pieces have arrived."""

    record: RequestRecord
    warm: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self, endpoint: Endpoint, prompt: list[int]) -> None:
        """Send and read. Raises EndpointError when the answer doesn't come whole."""
        body = endpoint.body(prompt, self.record.requested_output, EXTRA)
        await endpoint.stream(body, self.record, 0.0, self._count)
        if self.record.error:
            raise EndpointError(f"{endpoint.url}: {self.record.error}: {self.record.detail}")

    def _count(self, _: int) -> None:
        if len(self.record.times) >= TOKENS_BEFORE:
            self.warm.set()


def _random_prompt(length: int, vocab: int) -> list[int]:
    return random.choices(range(vocab // 100, vocab), k=length)


async def _until_warm(streams: list[Stream], tasks: "list[asyncio.Task[None]]") -> None:
    """Wait for all of them. Raises EndpointError when one ends before."""

    async def all_warm() -> None:
        for stream in streams:
            await stream.warm.wait()

    watch = asyncio.create_task(all_warm())
    done, _ = await asyncio.wait({watch, *tasks}, return_when=asyncio.FIRST_COMPLETED)
    for early in done - {watch}:
        for task in (watch, *tasks):
            task.cancel()
        await asyncio.gather(watch, *tasks, return_exceptions=True)
        if not early.cancelled() and (error := early.exception()) is not None:
            raise error
        raise EndpointError(
            f"a stream ended before all had {TOKENS_BEFORE} tokens", "raise --output"
        )


async def measure(endpoint: Endpoint, options: Options) -> str:
    """One round, in a line."""
    streams = [
        Stream(RequestRecord(number, 0.0, requested_output=options.output))
        for number in range(options.streams)
    ]
    tasks = [
        asyncio.create_task(each.run(endpoint, _random_prompt(options.context, options.vocab)))
        for each in streams
    ]
    await _until_warm(streams, tasks)
    begin = clock()
    long = Stream(RequestRecord(-1, 0.0, requested_output=16))
    await long.run(endpoint, _random_prompt(options.long, options.vocab))
    end = clock()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    gaps = [[(a, b - a) for a, b in itertools.pairwise(each.record.times)] for each in streams]
    quiet = statistics.median(gap for own in gaps for at, gap in own[20:] if at < begin)
    while_long = [gap for own in gaps for at, gap in own if begin <= at < end]
    many = sum(gap > 2 * quiet for gap in while_long) / len(streams)
    return (
        f"undisturbed {quiet * 1e3:.1f} ms; longest gap {max(while_long) * 1e3:.1f} ms; gaps over"
        f" twice the undisturbed one {many:.1f} per stream; the long prompt's first token after"
        f" {(long.record.times[0] - begin) * 1e3:.0f} ms"
    )


async def measure_rounds(options: Options) -> None:
    """All rounds, a line each."""
    async with Endpoint.open(options.url, timeout=TIMEOUT_SECONDS) as endpoint:
        await endpoint.discover()
        for number in range(options.rounds + 1):
            found = await measure(endpoint, options)
            if number:
                print(found, flush=True)


def run(options: Options) -> None:
    """On an event loop of its own."""
    asyncio.run(measure_rounds(options))
