"""Server-sent events of a streamed completion, taken apart at the rate at which they come."""

from typing import Any

import msgspec


class Choice(msgspec.Struct):
    """One choice of a chunk."""

    text: str = ""
    token_ids: list[int] | None = None
    finish_reason: str | None = None


class PromptDetails(msgspec.Struct):
    """Part of the usage."""

    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    """Token counts by the endpoint."""

    prompt_tokens: int = 0
    completion_tokens: int | None = None
    prompt_tokens_details: PromptDetails | None = None


class Chunk(msgspec.Struct):
    """One event. An error in the middle of a stream comes as an event too."""

    choices: list[Choice] = []
    usage: Usage | None = None
    error: Any = None
    object: str = ""


class EventParser:
    """Bytes in, events' data out; an event may arrive in pieces or many at once."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The payloads that became complete; comments and other fields are left out."""
        data = self._rest + data
        if b"\r" in data:
            # A "\r" at the end may be half of a line break.
            held = b"\r" if data.endswith(b"\r") else b""
            data = data.removesuffix(held).replace(b"\r\n", b"\n") + held
        *events, self._rest = data.split(b"\n\n")
        found: list[bytes] = []
        for event in events:
            if event.startswith(b"data:") and b"\n" not in event:
                found.append(event[5:].strip())
            else:
                lines = [line[5:].strip() for line in event.split(b"\n") if line[:5] == b"data:"]
                if lines:
                    found.append(b"\n".join(lines))
        return found
