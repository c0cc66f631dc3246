"""Request bodies, checked strictly: a wrong type is an error that names the parameter."""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from tandem_router.errors import InvalidRequest

MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_STOPS = 16
TokenIds = list[int]


def _one_or_many(value: Any) -> Any:
    """A single string stands for a list of one."""
    return [value] if isinstance(value, str) else value


Stops = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    BeforeValidator(_one_or_many),
    Field(max_length=MAX_STOPS),
]
LogitBias = dict[str, Annotated[float, Field(ge=-100, le=100)]]
Parsed = TypeVar("Parsed", bound=BaseModel)


class StreamOptions(BaseModel):
    """`stream_options` of OpenAI."""

    model_config = ConfigDict(strict=True, extra="ignore")

    include_usage: bool = False
    continuous_usage_stats: Literal[False] | None = None


class Sampling(BaseModel):
    """The fields of every generation request about sampling and routing."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    temperature: Annotated[float, Field(ge=0, le=10)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1 << 30)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: Stops | None = None
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=256)] | None = (
        None
    )
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    slo_class: str | None = None
    priority: Annotated[int, Field(ge=-(1 << 31), lt=1 << 31)] | None = None
    cache_salt: Annotated[str, Field(max_length=256)] | None = None


class OpenAISampling(Sampling):
    """What chat and text completions share."""

    model: str
    max_tokens: Annotated[int, Field(ge=1, le=1 << 30)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=1 << 30)] | None = None
    logit_bias: LogitBias | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    user: str | None = None


_UNSUPPORTED = {
    "tools": "tool calling",
    "functions": "function calling",
    "audio": "audio output",
    "modalities": "output other than text",
    "guided_json": "guided decoding",
    "guided_regex": "guided decoding",
    "guided_choice": "guided decoding",
    "structured_outputs": "guided decoding",
    "prompt_logprobs": "logprobs of the prompt",
    "suffix": "insertion before a suffix",
    "use_beam_search": "beam search",
    "chat_template": "a chat template in the request",
}


def refuse_unsupported(extra: dict[str, Any]) -> None:
    """Raise InvalidRequest for a field that would change the answer but isn't supported."""
    for name, what in _UNSUPPORTED.items():
        value = extra.get(name)
        if value not in (None, [], {}, False, "", ["text"]):
            raise InvalidRequest(f"{what} is not supported: leave out {name}", param=name)
    response_format = extra.get("response_format")
    if response_format is not None and response_format != {"type": "text"}:
        raise InvalidRequest(
            "response_format: only {'type': 'text'} is supported", param="response_format"
        )


class ContentPart(BaseModel):
    """One part of a message's content; only text parts are supported."""

    model_config = ConfigDict(strict=True, extra="ignore")

    type: Literal["text"]
    text: str


def _content(value: Any) -> Any:
    """A plain string stands for one text part."""
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class ChatMessage(BaseModel):
    """One message; further fields are kept for templates that use them."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[list[ContentPart], BeforeValidator(_content)] | None = None

    @model_validator(mode="after")
    def _has_content(self) -> "ChatMessage":
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a message with role {self.role!r} needs content")
        return self

    def for_template(self) -> dict[str, Any]:
        """What chat templates expect: content as one string."""
        parts = self.content or []
        return {
            **(self.model_extra or {}),
            "role": "system" if self.role == "developer" else self.role,
            "content": "".join(part.text for part in parts),
        }


class ChatRequest(OpenAISampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=1 << 30)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _alternatives_need_logprobs(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs: true", param="top_logprobs")
        return self


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(token) is int and token >= 0 for token in value)


def _prompts(value: Any) -> Any:
    """Text, texts, token ids or lists of token ids; always returned as a list of prompts."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(entry, str) for entry in value):
            return value
        if _is_ids(value):
            return [value]
        if all(_is_ids(entry) and entry for entry in value):
            return value
    raise ValueError(
        "must be a string, a list of strings, a list of token ids or a list of lists of token ids, "
        "and not empty"
    )


Prompts = Annotated[list[Any], BeforeValidator(_prompts), Field(max_length=1024)]


class CompletionRequest(OpenAISampling):
    """POST /v1/completions."""

    prompt: Prompts
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _no_ranking(self) -> "CompletionRequest":
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise InvalidRequest(
                "best_of is only supported when it equals n: leave it out", param="best_of"
            )
        if self.echo and self.logprobs is not None:
            raise InvalidRequest(
                "echo is not supported with logprobs: leave out one of them", param="echo"
            )
        return self


class GenerateParams(Sampling):
    """`sampling_params` of /generate; their names are accepted at the top level too."""

    max_new_tokens: Annotated[int, Field(ge=1, le=1 << 30)] | None = None
    min_new_tokens: Annotated[int, Field(ge=0, le=1 << 30)] | None = None


class GenerateRequest(GenerateParams):
    """POST /generate: one prompt or several, as text or as token ids."""

    text: Prompts | None = None
    input_ids: Prompts | None = None
    sampling_params: GenerateParams | None = None
    return_logprob: bool | None = None
    top_logprobs_num: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    model: str | None = None

    @model_validator(mode="after")
    def _one_input(self) -> "GenerateRequest":
        if (self.text is None) == (self.input_ids is None):
            raise InvalidRequest("give either text or input_ids", param="text")
        if self.text is not None and not all(isinstance(entry, str) for entry in self.text):
            raise InvalidRequest("text must be a string or a list of strings", param="text")
        if self.input_ids is not None and any(isinstance(entry, str) for entry in self.input_ids):
            raise InvalidRequest(
                "input_ids must be a list of token ids, or a list of such lists", param="input_ids"
            )
        return self


class TokenizeRequest(BaseModel):
    """POST /tokenize: text, or messages through the chat template."""

    model_config = ConfigDict(strict=True, extra="ignore")

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True

    @model_validator(mode="after")
    def _one_input(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequest("give either prompt or messages", param="prompt")
        return self


class DetokenizeRequest(BaseModel):
    """POST /detokenize."""

    model_config = ConfigDict(strict=True, extra="ignore")

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0)]]
    skip_special_tokens: bool = False


def parse(model: type[Parsed], body: bytes) -> Parsed:
    """The request in `body`. Raises InvalidRequest that names the first wrong parameter."""
    try:
        request = model.model_validate_json(body)
    except ValidationError as error:
        raise _explain(error) from error
    if isinstance(request, Sampling):
        refuse_unsupported(request.model_extra or {})
    return request


def _explain(error: ValidationError) -> InvalidRequest:
    first = error.errors(include_url=False)[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, InvalidRequest):
        return cause
    if first["type"] == "json_invalid":
        return InvalidRequest(f"the body is not valid JSON: {first['msg']}", code="invalid_json")
    place = ""
    for part in first["loc"]:
        place += f"[{part}]" if isinstance(part, int) else f".{part}" if place else part
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "missing":
        message = "is required"
    if not place:
        return InvalidRequest(f"the body must be a JSON object: {message}")
    return InvalidRequest(f"{place}: {message[:1].lower()}{message[1:]}", param=place)
