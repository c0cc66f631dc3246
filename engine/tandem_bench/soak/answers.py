"""What the soak's clients ask, what they should be told, and what they were told."""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import httpx

from tandem_bench.soak.fleet import MODEL_NAME
from tandem_engine.mock.runner import greedy_answer

REFUSALS: Final = {429: "overloaded", 503: "no_worker"}
"""The typed answers of a router that has no room, or no worker, for a new request."""


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt in token ids, greedy, and how many tokens it wants."""

    number: int
    prompt: tuple[int, ...]
    num_tokens: int

    def body(self) -> dict[str, Any]:
        """The completion that is asked for; no two requests share a cached prefix."""
        return {
            "model": MODEL_NAME,
            "prompt": list(self.prompt),
            "max_tokens": self.num_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
            "cache_salt": str(self.number),
        }


class Book(Protocol):
    """Questions with their right answers."""

    def question(self, number: int) -> Question:
        """The question of this number, the same at every call."""

    def answer(self, question: Question) -> Sequence[int]:
        """What a worker that nobody disturbs answers."""


class MockBook:
    """For the mock, whose tokens follow from a hash: every question is another one."""

    def __init__(self, seed: int, max_prompt: int, max_output: int) -> None:
        self._seed = seed
        self._max_prompt = max_prompt
        self._max_output = max_output

    def question(self, number: int) -> Question:
        rng = random.Random(f"{self._seed}/{number}")
        length = rng.randint(1, self._max_prompt)
        prompt = tuple(rng.randrange(256) for _ in range(length))
        return Question(number, prompt, rng.randint(1, self._max_output))

    def answer(self, question: Question) -> Sequence[int]:
        return greedy_answer(question.prompt, question.num_tokens)


class HeardBook:
    """For a real model: a few questions, with the answers of an undisturbed fleet."""

    def __init__(self, questions: list[Question], answers: list[list[int]]) -> None:
        self._questions = questions
        self._answers = answers

    def question(self, number: int) -> Question:
        known = self._questions[number % len(self._questions)]
        return Question(number, known.prompt, known.num_tokens)

    def answer(self, question: Question) -> Sequence[int]:
        return self._answers[question.number % len(self._answers)]


@dataclass
class Seen:
    """What the clients saw."""

    num_right: int = 0
    num_moved: int = 0  # answers that outlived a worker
    wrong: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    longest_gap: float = 0.0

    @property
    def num_answered(self) -> int:
        """All that have ended, however."""
        return self.num_right + len(self.wrong) + len(self.errors) + self.refused.total()


async def ask(
    client: httpx.AsyncClient, url: str, question: Question, book: Book, seen: Seen
) -> None:
    """One streamed completion; what came of it goes into `seen`."""
    loop = asyncio.get_running_loop()
    tokens: list[int] = []
    finish, error, failovers = "", "", 0
    last = loop.time()
    try:
        async with client.stream("POST", f"{url}/v1/completions", json=question.body()) as reply:
            if reply.status_code != 200:
                said = json.loads(await reply.aread()).get("error", {})
                if said.get("code") == REFUSALS.get(reply.status_code, ""):
                    seen.refused[said["code"]] += 1
                    return
                error = f"{reply.status_code}: {said}"
            async for line in reply.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                error = error or json.dumps(event.get("error", ""))[1:-1]
                failovers = event.get("tandem", {}).get("failovers", failovers)
                for choice in event.get("choices", []):
                    tokens += choice.get("token_ids") or []
                    finish = choice.get("finish_reason") or finish
                now = loop.time()
                seen.longest_gap, last = max(seen.longest_gap, now - last), now
    except (httpx.HTTPError, ValueError) as broken:
        error = f"{type(broken).__name__}: {broken}"
    name = f"request {question.number}"
    if error or not finish:
        seen.errors.append(f"{name}: {error or 'the stream ended without a finish reason'}")
    elif tokens != list(book.answer(question)):
        seen.wrong.append(f"{name}: {tokens[:20]} instead of {list(book.answer(question))[:20]}")
    else:
        seen.num_right += 1
        seen.num_moved += failovers > 0
