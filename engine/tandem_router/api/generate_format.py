"""The reply of /generate, as SGLang gives it: whole text so far in every chunk."""

from collections.abc import Sequence as SequenceOf
from typing import Any

from tandem_router.api.choice import Choice, TokenEntry
from tandem_router.api.formats import DONE, ReplyFormat, WholeChoice, encode


class GenerateFormat(ReplyFormat):
    """One object per choice, a list of them when there are several."""

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
