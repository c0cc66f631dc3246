"""The longest gap that running streams see while a long prompt arrives, at any OpenAI endpoint.

    python engine/benchmarks/longest_gap.py [--url http://127.0.0.1:8000] [--streams 32]

Streams that decode are watched before and while one long prompt is computed; prompts are random
token ids, so nothing is cached. The first round isn't printed: it compiles what is left to compile.
"""

import argparse
import asyncio
import itertools
import random
import statistics
import time

import aiohttp

TOKENS_BEFORE = 100


class Endpoint:
    """Streams completions from one model."""

    def __init__(self, session: aiohttp.ClientSession, url: str, model: str, vocab: int) -> None:
        self._session, self._url, self._model, self._vocab = session, url, model, vocab

    async def stream(
        self, num_prompt: int, num_output: int, times: list[float], warm: asyncio.Event
    ) -> None:
        """One request; the arrival of every event is appended to `times`, `warm` set after some."""
        body = {
            "model": self._model,
            "prompt": random.choices(range(self._vocab // 100, self._vocab), k=num_prompt),
            "max_tokens": num_output,
            "temperature": 0,
            "stream": True,
            "ignore_eos": True,
        }
        async with self._session.post(f"{self._url}/v1/completions", json=body) as response:
            if response.status != 200:
                raise RuntimeError(f"{response.status}: {await response.text()}")
            async for line in response.content:
                if line.startswith(b"data: {"):
                    times.append(time.perf_counter())
                    if len(times) == TOKENS_BEFORE:
                        warm.set()


async def measure(endpoint: Endpoint, arguments: argparse.Namespace) -> str:
    """One round, in a line."""
    times: list[list[float]] = [[] for _ in range(arguments.streams)]
    warm = [asyncio.Event() for _ in times]
    tasks = [
        asyncio.create_task(endpoint.stream(arguments.context, arguments.output, own, event))
        for own, event in zip(times, warm, strict=True)
    ]
    watch = asyncio.gather(*(event.wait() for event in warm))
    done, _ = await asyncio.wait({watch, *tasks}, return_when=asyncio.FIRST_COMPLETED)
    for early in done - {watch}:
        for task in (watch, *tasks):
            task.cancel()
        await asyncio.gather(watch, *tasks, return_exceptions=True)
        why = early.cancelled() or early.exception() or "raise --output"
        raise SystemExit(f"a stream ended before all had {TOKENS_BEFORE} tokens: {why}")
    begin = time.perf_counter()
    long: list[float] = []
    await endpoint.stream(arguments.long, 16, long, asyncio.Event())
    end = time.perf_counter()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    gaps = [[(a, b - a) for a, b in itertools.pairwise(own)] for own in times]
    quiet = statistics.median(gap for own in gaps for at, gap in own[20:] if at < begin)
    while_long = [gap for own in gaps for at, gap in own if begin <= at < end]
    many = sum(gap > 2 * quiet for gap in while_long) / len(times)
    return (
        f"undisturbed {quiet * 1e3:.1f} ms; longest gap {max(while_long) * 1e3:.1f} ms; gaps over"
        f" twice the undisturbed one {many:.1f} per stream; the long prompt's first token after"
        f" {(long[0] - begin) * 1e3:.0f} ms"
    )


async def run(arguments: argparse.Namespace) -> None:
    """All rounds."""
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        async with session.get(f"{arguments.url}/v1/models") as response:
            model = (await response.json())["data"][0]["id"]
        endpoint = Endpoint(session, arguments.url, model, arguments.vocab)
        for number in range(arguments.rounds + 1):
            found = await measure(endpoint, arguments)
            if number:
                print(found, flush=True)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--context", type=int, default=1024, help="tokens of their prompts")
    parser.add_argument("--output", type=int, default=1500, help="tokens that they may generate")
    parser.add_argument("--long", type=int, default=8192, help="tokens of the prompt that arrives")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vocab", type=int, default=100_000, help="token ids are below this")
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
