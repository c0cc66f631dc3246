"""Many streaming completions at once, and how each one ended."""

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any

import httpx


@dataclass
class Stream:
    """One streamed completion: its token ids, how it ended, its longest pause in seconds."""

    prompt: str
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish: str = ""
    error: str = ""
    longest_gap: float = 0.0
    retries: int = 0
    failovers: int = 0  # workers that this stream has outlived
    workers: tuple[str, ...] = ()  # that computed its prompt and its first tokens


async def run_stream(
    client: httpx.AsyncClient, url: str, body: dict[str, Any], retries: int = 0
) -> Stream:
    """One completion, begun again up to `retries` times if the connection breaks."""
    for attempt in range(retries + 1):
        stream = Stream(body["prompt"], retries=attempt)
        last = time.monotonic()
        try:
            async with client.stream("POST", f"{url}/v1/completions", json=body) as reply:
                if reply.status_code != 200:
                    stream.error = f"{reply.status_code}: {(await reply.aread()).decode()}"
                async for line in reply.aiter_lines():
                    if not line.startswith("data: ") or line == "data: [DONE]":
                        continue
                    now = time.monotonic()
                    stream.longest_gap = max(stream.longest_gap, now - last)
                    last = now
                    _take(stream, json.loads(line[6:]))
        except httpx.HTTPError as error:
            stream.error = f"{type(error).__name__}: {error}"
        if not stream.error and not stream.finish:
            stream.error = "the stream ended without a finish reason"
        if not stream.error:
            return stream
        await asyncio.sleep(0.5)
    return stream


def _take(stream: Stream, event: dict[str, Any]) -> None:
    if "error" in event:
        stream.error = json.dumps(event["error"])
    told = event.get("tandem", {})
    stream.failovers = told.get("failovers", stream.failovers)
    if "decode_worker" in told:
        stream.workers = (told["prefill_worker"], told["decode_worker"])
    for choice in event.get("choices", []):
        stream.text += choice.get("text", "")
        stream.tokens += choice.get("token_ids") or []
        stream.finish = choice.get("finish_reason") or stream.finish


def completion(model: str, prompt: str, max_tokens: int, **more: Any) -> dict[str, Any]:
    """A streaming request that reports token ids."""
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "return_token_ids": True,
        "ignore_eos": True,
        **more,
    }


async def run_streams(
    url: str, bodies: list[dict[str, Any]], retries: int = 0, spread: float = 0.0
) -> list[Stream]:
    """All of them at once (each start shifted by `spread` seconds), in order."""
    limits = httpx.Limits(max_connections=len(bodies) + 1, max_keepalive_connections=0)
    timeout = httpx.Timeout(120.0)
    async with httpx.AsyncClient(limits=limits, timeout=timeout) as client:

        async def delayed(index: int, body: dict[str, Any]) -> Stream:
            await asyncio.sleep(index * spread)
            return await run_stream(client, url, body, retries)

        return list(await asyncio.gather(*(delayed(i, b) for i, b in enumerate(bodies))))
