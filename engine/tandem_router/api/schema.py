"""Request bodies, checked strictly: a wrong type is an error that names the parameter.

What is a field here is honoured; `api.fields` says what becomes of all others.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from tandem_router.api.fields import (
    HARMLESS,
    HARMLESS_PART_FIELDS,
    HARMLESS_STREAM_OPTIONS,
    check_fields,
)
from tandem_router.errors import InvalidRequest

MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_STOPS = 16
TokenIds = list[int]


def _json_schema(*types: dict[str, Any]) -> WithJsonSchema:
    """What /openapi.json says of a field that takes several forms."""
    return WithJsonSchema({"anyOf": list(types)})


_TEXT = {"type": "string"}
_TEXTS = {"type": "array", "items": _TEXT, "minItems": 1}
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_ID_LISTS = {"type": "array", "items": _IDS, "minItems": 1}


def _stops(value: Any) -> Any:
    """A single string stands for a list of one."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of strings")
    return value


Stops = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    BeforeValidator(_stops),
    Field(max_length=MAX_STOPS),
    _json_schema(_TEXT, {**_TEXTS, "minItems": 0, "maxItems": MAX_STOPS}),
]
LogitBias = dict[str, Annotated[float, Field(ge=-100, le=100)]]
Parsed = TypeVar("Parsed", bound=BaseModel)


class StreamOptions(BaseModel):
    """`stream_options` of OpenAI."""

    model_config = ConfigDict(strict=True, extra="allow")

    include_usage: bool | None = None  # a last chunk with the usage
    continuous_usage_stats: bool | None = None  # the usage so far in every chunk


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
    logit_bias: LogitBias | None = None
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

    model: str | None = None  # left out: the one that is served
    max_tokens: Annotated[int, Field(ge=1, le=1 << 30)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=1 << 30)] | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None


class ContentPart(BaseModel):
    """One part of a message's content; only text parts are supported."""

    model_config = ConfigDict(strict=True, extra="allow")

    type: Literal["text"]
    text: str


def _content(value: Any) -> Any:
    """A plain string stands for one text part."""
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if value is not None and not isinstance(value, list):
        raise ValueError('must be a string or a list of {"type": "text", "text": …} parts')
    return value


Content = Annotated[
    list[ContentPart],
    BeforeValidator(_content),
    _json_schema(
        _TEXT,
        {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"type": {"const": "text"}, "text": _TEXT},
                "required": ["type", "text"],
            },
        },
    ),
]


class ChatMessage(BaseModel):
    """One message; further fields are kept for templates that use them."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None

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
            raise InvalidRequest("top_logprobs: needs logprobs: true", param="top_logprobs")
        return self


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(token) is int and token >= 0 for token in value)


def _as_texts(value: Any) -> list[str] | None:
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value and all(isinstance(entry, str) for entry in value):
        return value
    return None


def _as_id_lists(value: Any) -> list[list[int]] | None:
    if not isinstance(value, list) or not value:
        return None
    if _is_ids(value):
        return [value]
    return value if all(_is_ids(entry) and entry for entry in value) else None


def _texts(value: Any) -> list[str]:
    found = _as_texts(value)
    if found is None:
        raise ValueError("must be a string or a list of strings, and not empty")
    return found


def _id_lists(value: Any) -> list[list[int]]:
    found = _as_id_lists(value)
    if found is None:
        raise ValueError(
            "must be a list of token ids or a list of lists of token ids, and not empty"
        )
    return found


def _prompts(value: Any) -> list[str] | list[list[int]]:
    """Text, texts, token ids or lists of token ids; always returned as a list of prompts."""
    found = _as_texts(value) or _as_id_lists(value)
    if found is None:
        raise ValueError(
            "must be a string, a list of strings, a list of token ids or a list of lists of "
            "token ids, and not empty"
        )
    return found


_MANY = Field(max_length=1024)
_TEXT_FORMS = _json_schema(_TEXT, _TEXTS)
_ID_FORMS = _json_schema(_IDS, _ID_LISTS)
_ALL_FORMS = _json_schema(_TEXT, _TEXTS, _IDS, _ID_LISTS)
Prompts = Annotated[list[Any], BeforeValidator(_prompts), _MANY, _ALL_FORMS]
Texts = Annotated[list[Any], BeforeValidator(_texts), _MANY, _TEXT_FORMS]
IdLists = Annotated[list[Any], BeforeValidator(_id_lists), _MANY, _ID_FORMS]


class CompletionRequest(OpenAISampling):
    """POST /v1/completions."""

    prompt: Prompts
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    # 0: only the echo, whose logprobs score a prompt.
    max_tokens: Annotated[int, Field(ge=0, le=1 << 30)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _no_ranking(self) -> "CompletionRequest":
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise InvalidRequest(
                "best_of: must be n; the answers are not ranked here", param="best_of"
            )
        if self.max_tokens == 0 and not self.echo:
            raise InvalidRequest(
                "max_tokens: must be at least 1, or 0 together with echo", param="max_tokens"
            )
        return self


class GenerateParams(Sampling):
    """`sampling_params` of /generate; their names are accepted at the top level too."""

    max_new_tokens: Annotated[int, Field(ge=1, le=1 << 30)] | None = None
    min_new_tokens: Annotated[int, Field(ge=0, le=1 << 30)] | None = None


class GenerateRequest(GenerateParams):
    """POST /generate: one prompt or several, as text or as token ids."""

    text: Texts | None = None
    input_ids: IdLists | None = None
    sampling_params: GenerateParams | None = None
    return_logprob: bool | None = None
    top_logprobs_num: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    model: str | None = None

    @model_validator(mode="after")
    def _one_input(self) -> "GenerateRequest":
        if (self.text is None) == (self.input_ids is None):
            raise InvalidRequest("text: give either text or input_ids", param="text")
        return self


class TokenizeRequest(BaseModel):
    """POST /tokenize: text, or messages through the chat template."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_input(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequest("prompt: give either prompt or messages", param="prompt")
        return self


HARMLESS_FOR_TOKENS = HARMLESS.union(ChatRequest.model_fields, CompletionRequest.model_fields)
"""Clients count the tokens of a request by sending all of it: sampling changes none of them."""


class DetokenizeRequest(BaseModel):
    """POST /detokenize."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0)]]
    skip_special_tokens: bool = False


def parse(model: type[Parsed], body: bytes) -> Parsed:
    """The request in `body`. Raises InvalidRequest that names the first wrong parameter."""
    try:
        request = model.model_validate_json(body)
    except ValidationError as error:
        raise _explain(error) from error
    harmless = HARMLESS_FOR_TOKENS if isinstance(request, TokenizeRequest) else HARMLESS
    check_fields(request.model_extra or {}, model.model_fields, harmless=harmless)
    _check_nested(request)
    return request


def _check_nested(request: BaseModel) -> None:
    """The fields of objects inside the request; those of messages are the template's matter."""
    if isinstance(request, OpenAISampling) and request.stream_options is not None:
        options = request.stream_options
        check_fields(
            options.model_extra or {},
            StreamOptions.model_fields,
            place="stream_options",
            harmless=HARMLESS_STREAM_OPTIONS,
            refused={},
        )
    if isinstance(request, GenerateRequest) and request.sampling_params is not None:
        extra = request.sampling_params.model_extra or {}
        check_fields(extra, GenerateParams.model_fields, place="sampling_params")
    if isinstance(request, ChatRequest | TokenizeRequest):
        for number, message in enumerate(request.messages or ()):
            for at, part in enumerate(message.content or ()):
                check_fields(
                    part.model_extra or {},
                    ContentPart.model_fields,
                    place=f"messages[{number}].content[{at}]",
                    harmless=HARMLESS_PART_FIELDS,
                    refused={},
                )


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
