"""Which request fields are known, beside those that the schema honours.

A field is honoured (it is in `api.schema`), harmless (it has no effect on the answer here and is
accepted), refused with what to do instead (it would change the answer), or unknown. An unknown
field is refused by its name too: it may be a slip, or ask for something that isn't served. A field
that is null is as good as left out.
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from tandem_router.errors import InvalidRequest

HARMLESS: Final = frozenset(
    {
        # OpenAI: accounting, caching, scheduling, and speed
        "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
        "prompt_cache_retention", "prediction", "parallel_tool_calls",
        # vLLM and SGLang: names for logs; what fast tokenizers and this router do either way
        "request_id", "rid", "log_metrics", "conversation_id", "spaces_between_special_tokens",
        "return_text_in_logprobs",
    }
)  # fmt: skip

HARMLESS_STREAM_OPTIONS: Final = frozenset({"include_obfuscation"})
HARMLESS_PART_FIELDS: Final = frozenset(
    {"annotations", "cache_control", "citations", "id", "index"}
)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a field isn't served; `neutral` are values that ask for nothing."""

    what: str
    remedy: str
    neutral: tuple[Any, ...] = (False, "", [], {})


_GRAMMAR: Final = Refusal("guided decoding", "ask for the format in the prompt")
_TOOLS: Final = Refusal("tool calling", "describe the tools in a message and parse the answer")
_NO_TOOL: Final = Refusal(
    "a choice between tools", 'leave it out, or send "none" or "auto"', ("none", "auto", "", {})
)
_TEXT_ONLY: Final = Refusal("input or output other than text", "send and ask for text only")
_BEAMS: Final = Refusal(
    "beam search", "raise n, and rank the choices by their logprobs", (False, 1)
)
_LOGITS: Final = Refusal("a logits processor of the client's", "use logit_bias")
_RENDER: Final = "render the conversation yourself and send it to /v1/completions"
_PROMPT_LOGPROBS: Final = Refusal(
    "logprobs of the prompt", "ask for logprobs of the answer: workers report no others", (False,)
)

REFUSED: Final[Mapping[str, Refusal]] = {
    "tools": _TOOLS,
    "functions": _TOOLS,
    "tool_choice": _NO_TOOL,
    "function_call": _NO_TOOL,
    "web_search_options": Refusal("web search", "put what was found into a message", (False,)),
    "response_format": Refusal(
        "a format other than text",
        'leave it out, or send {"type": "text"}, and ask for the format in the prompt',
        ({"type": "text"},),
    ),
    **dict.fromkeys(
        (
            "guided_json", "guided_regex", "guided_choice", "guided_grammar", "json_schema",
            "guided_decoding_backend", "guided_whitespace_pattern", "structured_outputs", "regex",
            "ebnf", "grammar", "structural_tag",
        ),
        _GRAMMAR,
    ),
    "modalities": Refusal(_TEXT_ONLY.what, _TEXT_ONLY.remedy, ([], ["text"])),
    **dict.fromkeys(
        (
            "audio", "prompt_embeds", "input_embeds", "image_data", "audio_data", "video_data",
            "mm_processor_kwargs", "media_io_kwargs",
        ),
        _TEXT_ONLY,
    ),
    "reasoning_effort": Refusal(
        "reasoning_effort", "put it into chat_template_kwargs if the model's template reads it", ()
    ),
    "verbosity": Refusal("verbosity", "ask for it in the prompt", ("medium",)),
    "include_reasoning": Refusal(
        "leaving out the reasoning", "cut it from the answer yourself", (True,)
    ),
    "separate_reasoning": Refusal(
        "reasoning apart from the answer", "split the answer yourself", (False,)
    ),
    "thinking_token_budget": Refusal("a budget for reasoning", "lower max_tokens", ()),
    "suffix": Refusal("insertion before a suffix", "put the model's own markers into the prompt"),
    "use_beam_search": _BEAMS,
    "length_penalty": _BEAMS,
    "early_stopping": _BEAMS,
    "prompt_logprobs": _PROMPT_LOGPROBS,
    "logprob_start_len": Refusal(_PROMPT_LOGPROBS.what, _PROMPT_LOGPROBS.remedy, (-1,)),
    "token_ids_logprob": Refusal("logprobs of chosen ids", "raise top_logprobs_num"),
    "return_hidden_states": Refusal("hidden states", "ask for logprobs"),
    "return_tokens_as_token_ids": Refusal("ids instead of texts", "send return_token_ids: true"),
    "allowed_token_ids": Refusal(
        "a list of allowed tokens", "use logit_bias: 100 for each of them", ([],)
    ),
    "bad_words": Refusal("a list of bad words", "use logit_bias: -100 for their tokens", ([],)),
    "logits_processors": _LOGITS,
    "custom_logit_processor": _LOGITS,
    "custom_params": _LOGITS,
    "vllm_xargs": Refusal("vllm_xargs", "leave it out"),
    "stop_regex": Refusal("a stop pattern", "use stop"),
    "truncation": Refusal("truncation of the prompt", "shorten it", ("disabled",)),
    "chat_template": Refusal("a chat template of the client's", _RENDER),
    "documents": Refusal("documents beside the messages", "put them into a message"),
    "lora_path": Refusal("an adapter by its path", "give the adapter's served name as model"),
    "session_params": Refusal("a session on the server", "send the whole prompt"),
    "kv_transfer_params": Refusal("a hand-off of the client's", "leave it to the router"),
    "extra_body": Refusal("extra_body", "put its fields beside the others"),
    # Honoured by other endpoints:
    "truncate_prompt_tokens": Refusal("truncation of the prompt", "shorten it before you send it"),
    "continue_final_message": Refusal("continuing a message", "send it as the end of the prompt"),
    "echo": Refusal("the prompt in the answer", "put it before the answer yourself"),
    "best_of": Refusal("a choice between answers", "raise n and choose yourself", (1,)),
    "add_special_tokens": Refusal("special tokens beside the template's", _RENDER, (False,)),
}  # fmt: skip

_ELSEWHERE: Final = {
    "max_tokens": ("max_new_tokens",),
    "max_completion_tokens": ("max_tokens", "max_new_tokens"),
    "max_new_tokens": ("max_tokens",),
    "min_tokens": ("min_new_tokens",),
    "min_new_tokens": ("min_tokens",),
    "logprobs": ("return_logprob",),
    "top_logprobs": ("logprobs", "top_logprobs_num"),
    "return_logprob": ("logprobs",),
    "top_logprobs_num": ("top_logprobs", "logprobs"),
    "prompt": ("messages", "text"),
    "input": ("messages", "prompt", "text"),
    "messages": ("prompt", "text"),
    "text": ("messages", "prompt"),
    "input_ids": ("prompt",),
    "sampling_seed": ("seed",),
}
"""What a field of one endpoint is called at another."""


def check_fields(
    extra: Mapping[str, Any],
    honoured: Iterable[str],
    *,
    place: str = "",
    harmless: frozenset[str] = HARMLESS,
    refused: Mapping[str, Refusal] = REFUSED,
) -> None:
    """Raise InvalidRequest for a field of `extra` that would change the answer, or is unknown.

    `extra` are the fields that the schema doesn't honour; `place` is the object they are in.
    """
    for name, value in extra.items():
        if value is None or name in harmless:
            continue
        param = f"{place}.{name}" if place else name
        refusal = refused.get(name)
        if refusal is None:
            raise InvalidRequest(f"{param}: unknown field{_hint(name, honoured)}", param=param)
        if not any(_is_same(value, neutral) for neutral in refusal.neutral):
            raise InvalidRequest(
                f"{param}: {refusal.what} is not supported; {refusal.remedy}", param=param
            )


def _is_same(value: Any, neutral: Any) -> bool:
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _hint(name: str, honoured: Iterable[str]) -> str:
    known = list(honoured)
    likely = [other for other in _ELSEWHERE.get(name, ()) if other in known]
    likely = likely or difflib.get_close_matches(name, known, 1)
    return f"; did you mean {likely[0]}?" if likely else "; leave it out"
