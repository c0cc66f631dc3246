"""The bytes of answers, per endpoint, streamed or whole.

Streamed chunks are put together from pre-encoded pieces: only the text of a token is encoded per
token, by msgspec.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from typing import Any, Final, NamedTuple

import msgspec

from tandem_router.api.choice import Choice, TokenEntry, prompt_entries
from tandem_router.text.tokenizer import TextTokenizer

encode = msgspec.json.Encoder().encode
DONE = b"data: [DONE]\n\n"


def finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI writes -9999 for a token that can't come."""
    return max(logprob, -9999.0)


class UsageWanted(NamedTuple):
    """Where a stream tells its usage."""

    at_end: bool = False
    in_chunks: bool = False


NO_USAGE: Final = UsageWanted()


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
        usage_wanted: UsageWanted = NO_USAGE,
        return_token_ids: bool = False,
    ) -> None:
        self.request_id = request_id
        self.model = model
        self.tokenizer = tokenizer
        self.usage_wanted = usage_wanted
        self.return_token_ids = return_token_ids
        self.created = int(time.time())
        self.fingerprint = ""
        self.usage_so_far: Callable[[], dict[str, Any]] = dict

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
            "system_fingerprint": self.fingerprint,
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
        out += self._chunk_usage()
        if tandem is not None and not self.usage_wanted.at_end:
            out += b',"tandem":' + encode(tandem)
        return out + b"}\n\n"

    def _chunk_usage(self) -> bytes:
        if self.usage_wanted.in_chunks:
            return b',"usage":' + encode(self.usage_so_far())
        return b',"usage":null' if self.usage_wanted.at_end else b""

    def end(self, usage: dict[str, Any], tandem: dict[str, Any]) -> bytes:
        if not self.usage_wanted.at_end:
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
        logprobs = b'{"content":[]}' if choices[0].wants_logprobs else b"null"
        tail = b',"delta":{"role":"assistant","content":""},"logprobs":' + logprobs
        tail += b',"finish_reason":null}]'
        usage = self._chunk_usage()
        return b"".join(
            prefix + b"%d" % index + tail + usage + ids + b"}\n\n" for index in range(len(choices))
        )

    def chunk(self, choice: Choice, tandem: dict[str, Any] | None) -> bytes:
        logprobs = b"null"
        if choice.wants_logprobs:
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
                "logprobs": (
                    {"content": self._logprobs(entry.entries)}
                    if entry.choice.wants_logprobs
                    else None
                ),
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
            "logprob": finite(logprob),
            "bytes": list(piece),
        }


class CompletionFormat(OpenAIFormat):
    """/v1/completions. `echoed[p]` is put before the choices of prompt p, as text.

    With `scores_prompt` the echo has logprobs too, and comes with the first of the answer.
    """

    object_name = "text_completion"
    chunk_name = "text_completion"
    echoed: SequenceOf[str | list[int]] = ()
    scores_prompt = False

    def _echo(self, choice: Choice) -> str:
        if not self.echoed:
            return ""
        prompt = self.echoed[choice.prompt_index]
        return prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt)

    def begin(self, choices: SequenceOf[Choice]) -> bytes:
        prefix = self._chunk_prefix()
        self._starts = [prefix + b'%d,"text":' % index for index in range(len(choices))]
        self._unscored = {choice.sequence.index for choice in choices if self.scores_prompt}
        out = b""
        for choice in choices:
            if (self.echoed and not self.scores_prompt) or self.return_token_ids:
                ids = b""
                if self.return_token_ids:
                    ids = b',"prompt_token_ids":' + encode(choice.sequence.prompt)
                start = self._starts[choice.sequence.index] + encode(
                    "" if self.scores_prompt else self._echo(choice)
                )
                out += start + b',"logprobs":null,"finish_reason":null' + ids + b"}]"
                out += self._chunk_usage() + b"}\n\n"
        return out

    def chunk(self, choice: Choice, tandem: dict[str, Any] | None) -> bytes:
        index, text = choice.sequence.index, choice.text
        if index in self._unscored:
            self._unscored.remove(index)
            text = self._echo(choice) + text
            logprobs = encode(self._all_logprobs(choice, choice.entries))
        elif choice.wants_logprobs:
            logprobs = encode(self._logprobs(choice.entries, len(self._echo(choice))))
        else:
            logprobs = b"null"
        start = self._starts[index] + encode(text)
        return start + b',"logprobs":' + logprobs + self._chunk_suffix(choice, tandem)

    def whole(
        self, choices: SequenceOf[WholeChoice], usage: dict[str, Any], tandem: dict[str, Any]
    ) -> bytes:
        body = self._head(self.object_name)
        body["choices"] = [self._whole_choice(entry) for entry in choices]
        return encode({**body, "usage": usage, "tandem": tandem})

    def _whole_choice(self, entry: WholeChoice) -> dict[str, Any]:
        choice = entry.choice
        out = {
            "index": choice.sequence.index,
            "text": self._echo(choice) + "".join(entry.text),
            "logprobs": (
                self._all_logprobs(choice, entry.entries) if choice.wants_logprobs else None
            ),
            "finish_reason": choice.finish_reason,
        }
        if self.return_token_ids:
            out |= {"token_ids": entry.tokens, "prompt_token_ids": choice.sequence.prompt}
        return out

    def _all_logprobs(self, choice: Choice, entries: SequenceOf[TokenEntry]) -> dict[str, Any]:
        """Those of the answer's tokens; behind those of the prompt if it is scored."""
        answer = self._logprobs(entries, len(self._echo(choice)))
        if not self.scores_prompt:
            return answer
        first, *scored = prompt_entries(choice.sequence, self.tokenizer, len(self._echo(choice)))
        prompt = self._logprobs(scored)
        # Nothing comes before the first token, so nothing is known of its probability.
        start: dict[str, list[Any]] = {
            "tokens": [self._label(first.token)],
            "token_logprobs": [None],
            "top_logprobs": [None],
            "text_offset": [first.offset],
        }
        return {name: [*start[name], *prompt[name], *answer[name]] for name in answer}

    def _logprobs(self, entries: SequenceOf[TokenEntry], begin: int = 0) -> dict[str, Any]:
        return {
            "tokens": [self._label(entry.token) for entry in entries],
            "token_logprobs": [finite(entry.logprobs.logprob) for entry in entries],
            "top_logprobs": [self._top(entry) for entry in entries],
            "text_offset": [begin + entry.offset for entry in entries],
        }

    def _top(self, entry: TokenEntry) -> dict[str, float]:
        """The most likely tokens, best first, and the chosen one, which keeps its label."""
        chosen, found = entry.token, entry.logprobs
        top: dict[str, float] = {}
        own = self._label(chosen)
        for token, logprob in zip(found.top_ids, found.top_logprobs, strict=True):
            label = self._label(token)
            if token != chosen and (label == own or label in top):
                label = f"token_id:{token}"
            top[label] = finite(logprob)
        top.setdefault(own, finite(found.logprob))
        return top

    def _label(self, token: int) -> str:
        """A token's text; its bytes where they are no text, as OpenAI does; else its id."""
        piece = self.tokenizer.piece(token)
        try:
            return piece.decode() or f"token_id:{token}"
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


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
        if entry.choice.wants_logprobs:
            meta["output_token_logprobs"] = [self._logprob(item) for item in entry.entries]
            meta["output_top_logprobs"] = [self._alternatives(item) for item in entry.entries]
        return {"text": "".join(entry.text), "output_ids": entry.tokens, "meta_info": meta}

    def _logprob(self, entry: TokenEntry) -> tuple[float, int, str]:
        return (finite(entry.logprobs.logprob), entry.token, self.tokenizer.token_text(entry.token))

    def _alternatives(self, entry: TokenEntry) -> list[tuple[float, int, str]]:
        return [
            (finite(logprob), token, self.tokenizer.token_text(token))
            for token, logprob in zip(
                entry.logprobs.top_ids, entry.logprobs.top_logprobs, strict=True
            )
        ]
