"""Whether two endpoints of one model say the same, token by token, and how soon.

Greedy answers to the same random prompts, first one at a time, then all at once, when the order of
the sums differs from run to run. For a decode worker beside a prefill worker against one worker
alone: what is equal came through the hand-off unchanged.
"""

import asyncio
import itertools
import random
import statistics
from dataclasses import dataclass
from typing import Any, Final

from tandem_bench.errors import EndpointError
from tandem_bench.options import argument, option, parse_numbers
from tandem_bench.record import RequestRecord
from tandem_bench.serve.endpoint import Endpoint
from tandem_bench.serve.events import Choice

TIMEOUT_SECONDS: Final = 3600.0
EXTRA: Final[dict[str, Any]] = {"temperature": 0, "ignore_eos": True, "return_token_ids": True}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Whether two endpoints of one model say the same, token by token, and how soon."""

    url: str = argument("One endpoint.")
    other: str = argument("The other one.")
    lengths: str = option("50,63,64,65,128,129,700,1024,2049,3000,6000", "Tokens of the prompts.")
    copies: int = option(2, "Prompts of each length when all are asked at once.", minimum=1)
    output: int = option(24, "Tokens of each answer.", minimum=2)
    vocab: int = option(100_000, "Token ids are below this.")
    seed: int = option(0, "Seed of the prompts.")


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to one request; times in seconds."""

    tokens: list[int]
    first: float
    gaps: list[float]


async def ask(endpoint: Endpoint, prompt: list[int], num_tokens: int) -> Answer:
    """One streamed completion. Raises EndpointError when it doesn't come whole."""
    tokens: list[int] = []

    def take(choice: Choice) -> None:
        tokens.extend(choice.token_ids or ())

    record = RequestRecord(0, 0.0, requested_output=num_tokens)
    await endpoint.stream(endpoint.body(prompt, num_tokens, EXTRA), record, 0.0, on_choice=take)
    if record.error:
        raise EndpointError(f"{endpoint.url}: {record.error}: {record.detail}")
    if len(tokens) != num_tokens:
        raise EndpointError(
            f"{endpoint.url}: an answer has {len(tokens)} token ids instead of {num_tokens}",
            "ask endpoints that know return_token_ids and ignore_eos, as Tandem's do",
        )
    gaps = [later - sooner for sooner, later in itertools.pairwise(record.times)]
    return Answer(tokens, record.times[0] - record.sent, gaps)


async def ask_all(
    url: str, prompts: list[list[int]], num_tokens: int, *, at_once: bool
) -> list[Answer]:
    """An answer to every prompt."""
    async with Endpoint.open(url, timeout=TIMEOUT_SECONDS) as endpoint:
        await endpoint.discover()
        if at_once:
            return await asyncio.gather(*(ask(endpoint, p, num_tokens) for p in prompts))
        return [await ask(endpoint, prompt, num_tokens) for prompt in prompts]


def show_times(answers: list[Answer]) -> str:
    """The medians of the first token's time and of the gaps."""
    first = statistics.median(answer.first for answer in answers)
    gap = statistics.median(gap for answer in answers for gap in answer.gaps)
    return f"first token after {first * 1e3:.1f} ms, then every {gap * 1e3:.2f} ms"


async def compare(options: Options) -> None:
    """One at a time, then at once."""
    rng = random.Random(options.seed)
    once = parse_numbers(options.lengths, "--lengths")
    for at_once in (False, True):
        lengths = once * (options.copies if at_once else 1)
        prompts = [
            [rng.randrange(options.vocab // 100, options.vocab) for _ in range(n)] for n in lengths
        ]
        urls = (options.url, options.other)
        answers = [await ask_all(url, prompts, options.output, at_once=at_once) for url in urls]
        pairs = list(zip(*answers, strict=True))
        equal = sum(one.tokens == other.tokens for one, other in pairs)
        same = [
            one == other
            for a, b in pairs
            for one, other in zip(a.tokens, b.tokens, strict=True)
        ]  # fmt: skip
        print(
            f"{len(pairs)} prompts {'at once' if at_once else 'one at a time'}: {equal} answers of"
            f" {options.output} tokens are equal, {100 * sum(same) / len(same):.2f} % of tokens"
        )
        for url, found in zip(urls, answers, strict=True):
            print(f"  {url}: {show_times(found)}", flush=True)


def run(options: Options) -> None:
    """On an event loop of its own."""
    asyncio.run(compare(options))
