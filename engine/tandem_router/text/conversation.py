"""Conversations in OpenAI's wire form, made into what chat templates expect.

On the wire the arguments of a tool call are JSON text, and content may be null, absent or parts.
Templates are written for transformers, where arguments are a mapping and content is text.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from tandem_router.errors import InvalidRequest

REASONING_NAMES: Final = ("reasoning_content", "thinking", "reasoning")
"""Names under which clients and templates know an assistant's reasoning; the first is standard."""
_SHORT_ID: Final = 9


class Arguments(dict[str, Any]):
    """Arguments of a tool call: a mapping, which is JSON text where a template prints it.

    Most templates pass arguments to `tojson` or go through their items. DeepSeek's join them to the
    prompt as text, for which a dict has no form but Python's.
    """

    def __init__(self, values: Mapping[str, Any], text: str) -> None:
        """`text`: the JSON as the client wrote it."""
        super().__init__(values)
        self._text = text

    def __str__(self) -> str:
        return self._text

    def __add__(self, other: str) -> str:
        return self._text + other

    def __radd__(self, other: str) -> str:
        return other + self._text


class RawArguments(str):
    """Arguments that are no JSON object, as a model may have written them.

    `tojson` leaves them as they are.
    """


def prepare_messages(
    messages: Sequence[Mapping[str, Any]], *, short_ids: bool = False
) -> list[dict[str, Any]]:
    """The messages as templates expect them; those given are left as they are.

    Content is text, arguments are a mapping, null means absent, and reasoning has each of its
    names. With `short_ids` the ids of tool calls are cut to nine characters.

    Raises:
        InvalidRequest: content is neither text nor parts with text.
    """
    return [_prepare(message, number, short_ids) for number, message in enumerate(messages)]


def content_size(message: Mapping[str, Any]) -> int:
    """Roughly the number of characters of a message's content, whatever its form."""
    content = message.get("content")
    return len(content) if isinstance(content, str) else len(str(content or ""))


def _prepare(message: Mapping[str, Any], number: int, short_ids: bool) -> dict[str, Any]:
    prepared = {name: value for name, value in message.items() if value is not None}
    prepared["content"] = _text_of(message.get("content"), f"messages[{number}].content")
    reasoning = next((prepared[name] for name in REASONING_NAMES if name in prepared), None)
    if reasoning is not None:
        prepared = {"thinking": reasoning, **prepared, "reasoning_content": reasoning}
    calls = prepared.pop("tool_calls", None)
    if calls:
        prepared["tool_calls"] = [
            _prepare_call(call, short_ids) if isinstance(call, Mapping) else call for call in calls
        ]
    if short_ids and isinstance(prepared.get("tool_call_id"), str):
        prepared["tool_call_id"] = _shorten(prepared["tool_call_id"])
    return prepared


def _text_of(content: Any, place: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, Sequence) else [content]
    texts = [
        part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None
        for part in parts
    ]
    if not all(isinstance(text, str) for text in texts):
        raise InvalidRequest(
            f"{place}: only text and parts with text are supported", param="messages"
        )
    return "".join(str(text) for text in texts)


def _prepare_call(call: Mapping[str, Any], short_ids: bool) -> dict[str, Any]:
    prepared = {name: value for name, value in call.items() if value is not None}
    if short_ids and isinstance(prepared.get("id"), str):
        prepared["id"] = _shorten(prepared["id"])
    function = prepared.get("function")
    if isinstance(function, Mapping):
        prepared["function"] = {**function, "arguments": _read_arguments(function.get("arguments"))}
    return prepared


def _read_arguments(arguments: Any) -> Any:
    """A mapping from JSON text; anything else stays the text that it is."""
    if arguments is None or arguments == "":
        return Arguments({}, "{}")
    if isinstance(arguments, Mapping):
        return Arguments(arguments, json.dumps(arguments, ensure_ascii=False))
    if not isinstance(arguments, str):
        return RawArguments(json.dumps(arguments, ensure_ascii=False))
    try:
        values = json.loads(arguments)
    except ValueError:
        return RawArguments(arguments)
    if isinstance(values, str):  # encoded twice by the client
        return _read_arguments(values) if values != arguments else RawArguments(values)
    if values is None:
        return Arguments({}, "{}")
    return Arguments(values, arguments) if isinstance(values, dict) else RawArguments(arguments)


def _shorten(identifier: str) -> str:
    """The same nine letters and digits for the same id."""
    if len(identifier) == _SHORT_ID and identifier.isalnum():
        return identifier
    return hashlib.sha256(identifier.encode()).hexdigest()[:_SHORT_ID]
