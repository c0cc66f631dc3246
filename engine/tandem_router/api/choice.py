"""One choice of an answer: its tokens become text, logprobs and a finish reason."""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from tandem_router.dispatch.sequence import Sequence
from tandem_router.text.stop import StopMatcher
from tandem_router.text.tokenizer import TextTokenizer
from tandem_wire.messages import StepItem, TokenLogprobs


@dataclass(frozen=True, slots=True)
class TokenEntry:
    """A chosen token with its logprobs; `offset` is where its text begins in the choice's text."""

    token: int
    logprobs: TokenLogprobs
    offset: int


def prompt_entries(
    sequence: Sequence, tokenizer: TextTokenizer, num_characters: int
) -> list[TokenEntry]:
    """The prompt's tokens, with where their text begins in the echo of `num_characters`.

    The first one has no logprobs: those it is given mean nothing.
    """
    detokenizer = tokenizer.detokenizer()
    logprobs = [TokenLogprobs(0.0), *sequence.prompt_logprobs]
    entries, offset = [], 0
    for token, found in zip(sequence.prompt, logprobs, strict=True):
        entries.append(TokenEntry(token, found, min(offset, num_characters)))
        offset += len(detokenizer.feed((token,)))
    return entries


class Choice:
    """Consumes step items of one sequence.

    After `feed`, the attributes `text`, `tokens` and `entries` hold what is new and may be shown,
    `finish_reason` is set once the choice is over.
    """

    __slots__ = (
        "_detokenizer", "_end_tokens", "_is_empty", "_matcher", "_min_tokens", "_num_certain",
        "entries", "finish_reason", "num_tokens", "prompt_index", "sequence", "text", "tokens",
        "wants_logprobs",
    )  # fmt: skip

    def __init__(
        self,
        sequence: Sequence,
        tokenizer: TextTokenizer,
        *,
        prompt_index: int,
        stops: SequenceOf[str],
        skip_special_tokens: bool,
        end_tokens: frozenset[int],
        is_empty: bool = False,
    ) -> None:
        """`end_tokens` end the choice without being part of its text.

        With `is_empty` no token is wanted, and the one that every sequence has is dropped.
        """
        self.sequence = sequence
        self.prompt_index = prompt_index
        self._detokenizer = tokenizer.detokenizer(
            skip_special_tokens=skip_special_tokens, context=sequence.prompt[-8:]
        )
        self._matcher = StopMatcher(stops) if stops else None
        self._min_tokens = sequence.params.min_tokens
        self._end_tokens = end_tokens
        self._is_empty = is_empty
        self._num_certain = 0  # characters that the detokenizer has returned
        self.wants_logprobs = sequence.params.logprobs is not None
        self.num_tokens = 0  # of the answer so far, the one that ended it included
        self.text = ""
        self.tokens: list[int] = []
        self.entries: list[TokenEntry] = []
        self.finish_reason = ""

    def feed(self, item: StepItem) -> bool:
        """Take one item; True when there is something new to show."""
        tokens = item.tokens
        if self._is_empty:
            self.finish_reason = "length" if item.finish else ""
            return bool(item.finish)
        self.tokens = tokens
        if item.finish:
            self.finish_reason = "length" if item.finish == "length" else "stop"
        visible = tokens
        if item.finish == "stop" and tokens and tokens[-1] in self._end_tokens:
            visible = tokens[:-1]
        if self._matcher is None and not self.wants_logprobs:
            self.num_tokens += len(tokens)
            text = self._detokenizer.feed(visible) if visible else ""
            if item.finish:
                text += self._detokenizer.flush()
            self.text = text
            return bool(text) or bool(item.finish)
        return self._feed_carefully(item, len(visible))

    def _feed_carefully(self, item: StepItem, num_visible: int) -> bool:
        """Token by token: a stop string may end in the middle of a step.

        Every token of the answer has its entry, as it counts: also one without text, and the one
        that ended the answer.
        """
        shown = ""
        stopped = False
        self.entries = []
        for position, token in enumerate(item.tokens):
            self.num_tokens += 1
            if self.wants_logprobs and item.logprobs is not None:
                logprobs = item.logprobs[position]
                self.entries.append(TokenEntry(token, logprobs, self._num_certain))
            if position >= num_visible:
                break
            new, stopped = self._match(self._detokenizer.feed((token,)))
            shown += new
            if stopped:
                self.tokens = item.tokens[: position + 1]
                break
        if item.finish and not stopped:
            new, stopped = self._match(self._detokenizer.flush())
            shown += new
            if not stopped and self._matcher is not None:
                shown += self._matcher.flush()
        if stopped:
            self.finish_reason = "stop"
            del self.sequence.output[self.num_tokens :]  # came along behind the stop string
            self.sequence.cancel()
        self.text = shown
        return bool(shown or self.entries or self.finish_reason)

    def _match(self, text: str) -> tuple[str, bool]:
        self._num_certain += len(text)
        if self._matcher is None:
            return text, False
        return self._matcher.feed(text, armed=self.num_tokens > self._min_tokens)
