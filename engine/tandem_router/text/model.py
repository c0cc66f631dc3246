"""A model's text side: tokenizer and chat template together."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Final

from tandem_router.text.chat_template import PLAIN_STOP, ChatTemplate
from tandem_router.text.conversation import content_size
from tandem_router.text.tokenizer import TextTokenizer

OFFLOAD_CHARACTERS: Final = 8192


class TextModel:
    """Prompts for one model. Long ones are tokenized in a thread, so that streams keep moving.

    `vocab_size`: the model's number of embeddings; the ids of a prompt are below it. The
    tokenizer's own number may be larger or smaller.
    """

    def __init__(
        self, tokenizer: TextTokenizer, template: ChatTemplate, vocab_size: int | None = None
    ) -> None:
        """`vocab_size` None: the tokenizer's."""
        self.tokenizer = tokenizer
        self.template = template
        self.vocab_size = tokenizer.vocab_size if vocab_size is None else vocab_size

    @property
    def default_chat_stops(self) -> tuple[str, ...]:
        """Stop strings that end a turn where the model has no template of its own."""
        return PLAIN_STOP if self.template.is_plain else ()

    async def encode_text(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a plain prompt."""
        if len(text) < OFFLOAD_CHARACTERS:
            return self.tokenizer.encode_prompt(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(
            self.tokenizer.encode_prompt, text, add_special_tokens=add_special_tokens
        )

    async def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation. Raises InvalidRequest when the template rejects it."""
        size = sum(map(content_size, messages))
        arguments = (messages, add_generation_prompt, continue_final_message, variables)
        if size < OFFLOAD_CHARACTERS:
            return self._encode_chat(*arguments)
        return await asyncio.to_thread(self._encode_chat, *arguments)

    def _encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        continue_final_message: bool,
        variables: Mapping[str, Any] | None,
    ) -> list[int]:
        text = self.template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables=variables,
        )
        # A model's own template writes its special tokens itself.
        return self.tokenizer.encode_prompt(text, add_special_tokens=self.template.is_plain)

    def shorten(self, prompt: list[int], num_tokens: int) -> list[int]:
        """The last `num_tokens` of a prompt, of which the begin-of-sequence token stays the first.

        So do transformers with `truncation_side="left"`, and with them vLLM.
        """
        if len(prompt) <= num_tokens:
            return prompt
        first = prompt[:1] if prompt[0] == self.tokenizer.bos_token_id else []
        return [*first, *prompt[len(prompt) - num_tokens + len(first) :]][:num_tokens]
