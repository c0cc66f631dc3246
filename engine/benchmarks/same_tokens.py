"""Whether two endpoints of one model say the same, token by token, and how soon.

    python engine/benchmarks/same_tokens.py URL OTHER_URL [--lengths 50,700,3000]

Greedy answers to the same random prompts, first one at a time, then all at once, of which the order
of the sums differs from run to run. For a decode worker beside a prefill worker against one worker
alone: what is equal came through the hand-off unchanged.
"""

import argparse
import asyncio
import itertools
import json
import random
import statistics
import time
from dataclasses import dataclass

import aiohttp


@dataclass(frozen=True, slots=True)
class Answer:
    """Of one request; seconds."""

    tokens: list[int]
    first: float
    gaps: list[float]


async def ask(
    session: aiohttp.ClientSession, url: str, model: str, prompt: list[int], num_tokens: int
) -> Answer:
    """One streamed completion."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": num_tokens,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    tokens: list[int] = []
    begin = time.perf_counter()
    times = [begin]
    async with session.post(f"{url}/v1/completions", json=body) as response:
        if response.status != 200:
            raise SystemExit(f"{url}: {response.status}: {await response.text()}")
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            choices = json.loads(line[6:]).get("choices", [])
            found = [token for choice in choices for token in choice.get("token_ids") or ()]
            if found:
                tokens += found
                times.append(time.perf_counter())
    if len(tokens) != num_tokens:
        raise SystemExit(f"{url}: {len(tokens)} tokens instead of {num_tokens}")
    gaps = [later - sooner for sooner, later in itertools.pairwise(times[1:])]
    return Answer(tokens, times[1] - begin, gaps)


async def ask_all(
    url: str, prompts: list[list[int]], num_tokens: int, *, at_once: bool
) -> list[Answer]:
    """An answer to every prompt."""
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        async with session.get(f"{url}/v1/models") as response:
            model = (await response.json())["data"][0]["id"]
        if at_once:
            return list(
                await asyncio.gather(*(ask(session, url, model, p, num_tokens) for p in prompts))
            )
        return [await ask(session, url, model, prompt, num_tokens) for prompt in prompts]


def show_times(answers: list[Answer]) -> str:
    """Medians."""
    first = statistics.median(answer.first for answer in answers)
    gap = statistics.median(gap for answer in answers for gap in answer.gaps)
    return f"first token after {first * 1e3:.1f} ms, then every {gap * 1e3:.2f} ms"


async def run(arguments: argparse.Namespace) -> None:
    """Both ways."""
    rng = random.Random(arguments.seed)
    for at_once in (False, True):
        lengths = arguments.lengths * (arguments.copies if at_once else 1)
        prompts = [[rng.randrange(1000, arguments.vocab) for _ in range(n)] for n in lengths]
        answers = [
            await ask_all(url, prompts, arguments.output, at_once=at_once)
            for url in (arguments.url, arguments.other)
        ]
        pairs = list(zip(*answers, strict=True))
        equal = sum(one.tokens == other.tokens for one, other in pairs)
        same = [
            one == other
            for a, b in pairs
            for one, other in zip(a.tokens, b.tokens, strict=True)
        ]  # fmt: skip
        print(
            f"{len(pairs)} prompts {'at once' if at_once else 'one at a time'}: {equal} answers of"
            f" {arguments.output} tokens are equal, {100 * sum(same) / len(same):.2f} % of tokens"
        )
        for url, found in zip((arguments.url, arguments.other), answers, strict=True):
            print(f"  {url}: {show_times(found)}", flush=True)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("other")
    parser.add_argument(
        "--lengths",
        type=lambda text: [int(part) for part in text.split(",")],
        default="50,63,64,65,128,129,700,1024,2049,3000,6000",
        help="tokens of the prompts",
    )
    parser.add_argument("--copies", type=int, default=2, help="of each length, at once")
    parser.add_argument("--output", type=int, default=24, help="tokens of each answer")
    parser.add_argument("--vocab", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
