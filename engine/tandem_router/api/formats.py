"""The bytes of answers, per endpoint, streamed or whole.

Streamed chunks are put together from pre-encoded pieces: only the text of a token is encoded per
token, by msgspec.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence as SequenceOf
from typing import Any

import msgspec

from tandem_router.api.choice import Choice, TokenEntry
from tandem_router.text.tokenizer import TextTokenizer

encode = msgspec.json.Encoder().encode
DONE = b"data: [DONE]\n\n"


class WholeChoice(msgspec.Struct):
    """A choice of an answer that isn't streamed, collected piece by piece."""

    choice: Choice
    text: list[str] = []
    tokens: list[int] = []
    entries: list[TokenEntry] = []

    def add(self) -> None:
        """Take over what the choice has new."""
        self.text.append(self.choice.text)
        self.tokens += self.choice.tokens
        self.entries += self.choice.entries


class ReplyFormat(ABC):
    """Shapes the answer of one request."""

    def __init__(
        self,
        request_id: str,
        model: str,
        tokenizer: TextTokenizer,
        *,
        include_usage: bool = False,
        return_token_ids: bool = False,
    ) -> None:
        self.request_id = request_id
        self.model = model
        self.tokenizer = tokenizer
        self.include_usage = include_usage
        self.return_token_ids = return_token_ids
        self.created = int(time.time())

    @abstractmethod
    def begin(self, choices: SequenceOf[Choice]) -> bytes:
        """What a stream starts with."""

    @abstractmethod
    def chunk(self, choice: Choice, tandem: dict[str, Any] | None) -> bytes:
        """What is new in a choice; `tandem` comes with the last chunk that has a choice."""

    @abstractmethod
    def end(self, usage: dict[str, Any], tandem: dict[str, Any]) -> bytes:
        """What a stream ends with."""

    @abstractmethod
    def whole(
        self, choices: SequenceOf[WholeChoice], usage: dict[str, Any], tandem: dict[str, Any]
    ) -> bytes:
        """The body of an answer that isn't streamed."""


class OpenAIFormat(ReplyFormat):
    """What chat and text completions share."""

    object_name = ""
    chunk_name = ""

    def _head(self, name: str) -> dict[str, Any]:
        return {
            "id": self.request_id,
            "object": name,
            "created": self.created,
            "model": self.model,
        }

    def _chunk_prefix(self) -> bytes:
        return b"data: " + encode(self._head(self.chunk_name))[:-1] + b',"choices":[{"index":'

    def _chunk_suffix(self, choice: Choice, tandem: dict[str, Any] | None) -> bytes:
        """From the finish reason to the end of the chunk, its quote of the text closed before."""
        out = b',"finish_reason":'
        out += encode(choice.finish_reason) if choice.finish_reason else b"null"
        if self.return_token_ids:
            out += b',"token_ids":' + encode(choice.tokens)
        out += b"}]"
        if self.include_usage:
            out += b',"usage":null'
        elif tandem is not None:
            out += b',"tandem":' + encode(tandem)
        return out + b"}\n\n"

    def end(self, usage: dict[str, Any], tandem: dict[str, Any]) -> bytes:
        if not self.include_usage:
            return DONE
        last = {**self._head(self.chunk_name), "choices": [], "usage": usage, "tandem": tandem}
        return b"data: " + encode(last) + b"\n\n" + DONE


class ChatFormat(OpenAIFormat):
    """/v1/chat/completions."""

    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def begin(self, choices: SequenceOf[Choice]) -> bytes:
        prefix = self._prefix = self._chunk_prefix()
        self._starts = [prefix + b'%d,"delta":{"content":' % index for index in range(len(choices))]
        ids = b""
        if self.return_token_ids:
            ids = b',"prompt_token_ids":' + encode(choices[0].sequence.prompt)
        tail = b',"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]'
        usage = b',"usage":null' if self.include_usage else b""
        return b"".join(
            prefix + b"%d" % index + tail + usage + ids + b"}\n\n" for index in range(len(choices))
        )

    def chunk(self, choice: Choice, tandem: dict[str, Any] | None) -> bytes:
        logprobs = b"null"
        if choice.entries:
            logprobs = encode({"content": self._logprobs(choice.entries)})
        if not choice.text and choice.finish_reason:
            start = self._prefix + b'%d,"delta":{}' % choice.sequence.index
        else:
            start = self._starts[choice.sequence.index] + encode(choice.text) + b"}"
        return start + b',"logprobs":' + logprobs + self._chunk_suffix(choice, tandem)

    def whole(
        self, choices: SequenceOf[WholeChoice], usage: dict[str, Any], tandem: dict[str, Any]
    ) -> bytes:
        body = self._head(self.object_name)
        body["choices"] = [
            {
                "index": entry.choice.sequence.index,
                "message": {"role": "assistant", "content": "".join(entry.text), "refusal": None},
                "logprobs": {"content": self._logprobs(entry.entries)} if entry.entries else None,
                "finish_reason": entry.choice.finish_reason,
                **({"token_ids": entry.tokens} if self.return_token_ids else {}),
            }
            for entry in choices
        ]
        if self.return_token_ids:
            body["prompt_token_ids"] = choices[0].choice.sequence.prompt
        return encode({**body, "usage": usage, "tandem": tandem})

    def _logprobs(self, entries: SequenceOf[TokenEntry]) -> list[dict[str, Any]]:
        return [
            {
                **self._token(entry.token, entry.logprobs.logprob),
                "top_logprobs": [
                    self._token(token, logprob)
                    for token, logprob in zip(
                        entry.logprobs.top_ids, entry.logprobs.top_logprobs, strict=True
                    )
                ],
            }
            for entry in entries
        ]

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        piece = self.tokenizer.piece(token)
        return {
            "token": piece.decode("utf-8", "replace"),
            "logprob": max(logprob, -9999.0),
            "bytes": list(piece),
        }


class CompletionFormat(OpenAIFormat):
    """/v1/completions. `echoes[p]` is the text put before the choices of prompt p."""

    object_name = "text_completion"
    chunk_name = "text_completion"
    echoes: SequenceOf[str] = ()

    def begin(self, choices: SequenceOf[Choice]) -> bytes:
        prefix = self._chunk_prefix()
        self._starts = [prefix + b'%d,"text":' % index for index in range(len(choices))]
        out = b""
        for choice in choices:
            if self.echoes or self.return_token_ids:
                echo = self.echoes[choice.prompt_index] if self.echoes else ""
                ids = b""
                if self.return_token_ids:
                    ids = b',"prompt_token_ids":' + encode(choice.sequence.prompt)
                start = self._starts[choice.sequence.index] + encode(echo)
                out += start + b',"logprobs":null,"finish_reason":null' + ids + b"}]}\n\n"
        return out

    def chunk(self, choice: Choice, tandem: dict[str, Any] | None) -> bytes:
        logprobs = encode(self._logprobs(choice.entries)) if choice.entries else b"null"
        start = self._starts[choice.sequence.index] + encode(choice.text)
        return start + b',"logprobs":' + logprobs + self._chunk_suffix(choice, tandem)

    def whole(
        self, choices: SequenceOf[WholeChoice], usage: dict[str, Any], tandem: dict[str, Any]
    ) -> bytes:
        body = self._head(self.object_name)
        body["choices"] = [self._whole_choice(entry) for entry in choices]
        return encode({**body, "usage": usage, "tandem": tandem})

    def _whole_choice(self, entry: WholeChoice) -> dict[str, Any]:
        choice = entry.choice
        echo = self.echoes[choice.prompt_index] if self.echoes else ""
        out = {
            "index": choice.sequence.index,
            "text": echo + "".join(entry.text),
            "logprobs": self._logprobs(entry.entries) if entry.entries else None,
            "finish_reason": choice.finish_reason,
        }
        if self.return_token_ids:
            out |= {"token_ids": entry.tokens, "prompt_token_ids": choice.sequence.prompt}
        return out

    def _logprobs(self, entries: SequenceOf[TokenEntry]) -> dict[str, Any]:
        text = self.tokenizer.token_text
        return {
            "tokens": [text(entry.token) for entry in entries],
            "token_logprobs": [max(entry.logprobs.logprob, -9999.0) for entry in entries],
            "top_logprobs": [
                {
                    text(token): max(logprob, -9999.0)
                    for token, logprob in zip(
                        entry.logprobs.top_ids, entry.logprobs.top_logprobs, strict=True
                    )
                }
                for entry in entries
            ],
            "text_offset": [entry.offset for entry in entries],
        }


class GenerateFormat(ReplyFormat):
    """/generate, as SGLang answers it: the whole text so far in every chunk.

    One object per choice, and a list of them when there are several.
    """

    is_batch = False

    def begin(self, choices: SequenceOf[Choice]) -> bytes:
        self._so_far = [WholeChoice(choice, [], [], []) for choice in choices]
        return b""

    def chunk(self, choice: Choice, tandem: dict[str, Any] | None) -> bytes:
        so_far = self._so_far[choice.sequence.index]
        so_far.add()
        reply = self._reply(so_far)
        if self.is_batch:
            reply["index"] = choice.sequence.index
        if tandem is not None:
            reply["tandem"] = tandem
        return b"data: " + encode(reply) + b"\n\n"

    def end(self, usage: dict[str, Any], tandem: dict[str, Any]) -> bytes:
        return DONE

    def whole(
        self, choices: SequenceOf[WholeChoice], usage: dict[str, Any], tandem: dict[str, Any]
    ) -> bytes:
        replies = [self._reply(entry) for entry in choices]
        for reply in replies:
            reply["tandem"] = tandem
        return encode(replies if self.is_batch else replies[0])

    def _reply(self, entry: WholeChoice) -> dict[str, Any]:
        sequence = entry.choice.sequence
        reason = entry.choice.finish_reason
        finish: dict[str, Any] | None = {"type": reason} if reason else None
        if finish is not None and reason == "length":
            finish["length"] = len(entry.tokens)
        meta: dict[str, Any] = {
            "id": self.request_id,
            "finish_reason": finish,
            "prompt_tokens": len(sequence.prompt),
            "completion_tokens": len(entry.tokens),
            "cached_tokens": sequence.num_cached_tokens,
            "e2e_latency": max(sequence.last_token_at - sequence.arrived_at, 0.0),
        }
        if entry.entries:
            meta["output_token_logprobs"] = [self._logprob(item) for item in entry.entries]
            meta["output_top_logprobs"] = [self._alternatives(item) for item in entry.entries]
        return {"text": "".join(entry.text), "output_ids": entry.tokens, "meta_info": meta}

    def _logprob(self, entry: TokenEntry) -> tuple[float, int, str]:
        return (entry.logprobs.logprob, entry.token, self.tokenizer.token_text(entry.token))

    def _alternatives(self, entry: TokenEntry) -> list[tuple[float, int, str]]:
        return [
            (logprob, token, self.tokenizer.token_text(token))
            for token, logprob in zip(
                entry.logprobs.top_ids, entry.logprobs.top_logprobs, strict=True
            )
        ]
