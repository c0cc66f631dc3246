"""Everything the router can answer instead of tokens.

    RouterError
    ├── InvalidRequest             400, names the parameter (a ValueError)
    │   └── ContextLengthExceeded  400, prompt and output can never fit
    ├── Unauthorized               401
    ├── NotFound                   404, unknown model or path
    ├── MethodNotAllowed           405
    ├── RequestTimeout             408, the request came too slowly
    ├── BodyTooLarge               413 (a ValueError)
    ├── UnsupportedEncoding        415
    ├── Overloaded                 429, Retry-After
    ├── HeadTooLarge               431
    ├── GenerationFailed           500, a worker failed and no other could go on
    └── NoWorker                   503, Retry-After
ModelLoadError (the tokenizer can't be loaded) and PortError (a port is taken) end the process
instead.
"""

from typing import ClassVar, Self

import msgspec


class RouterError(Exception):
    """An answer with an HTTP status in OpenAI's error shape."""

    status: ClassVar[int] = 500
    kind: ClassVar[str] = "internal_error"
    default_code: ClassVar[str | None] = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or self.default_code
        self.retry_after_seconds = retry_after_seconds

    def body(self) -> bytes:
        """The JSON body: {"error": {message, type, param, code}}."""
        error = {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        }
        return msgspec.json.encode({"error": error})


class InvalidRequest(RouterError, ValueError):
    """The client's fault; `param` names the field."""

    status = 400
    kind = "invalid_request_error"


class ContextLengthExceeded(InvalidRequest):
    """Prompt and output together can never fit the model.

    Clients (the openai SDK, litellm, langchain) know it by its status 400, its code, and the words
    "maximum context length" in its message. langchain looks for the code in the message, where the
    openai SDK no longer puts it.
    """

    default_code = "context_length_exceeded"

    @classmethod
    def of(cls, max_model_len: int, because: str, param: str | None = None) -> Self:
        """The message in OpenAI's words, followed by `because`."""
        return cls(
            f"This model's maximum context length is {max_model_len} tokens. {because}"
            f" (code: {cls.default_code})",
            param=param,
        )


class Unauthorized(RouterError):
    """The API key is missing or unknown."""

    status = 401
    kind = "authentication_error"
    default_code = "invalid_api_key"


class NotFound(RouterError):
    """An unknown model or path."""

    status = 404
    kind = "invalid_request_error"
    default_code = "not_found"


class MethodNotAllowed(RouterError):
    """The path exists, the method doesn't."""

    status = 405
    kind = "invalid_request_error"
    default_code = "method_not_allowed"


class RequestTimeout(RouterError):
    """The client took too long to send its request."""

    status = 408
    kind = "invalid_request_error"
    default_code = "request_timeout"


class BodyTooLarge(RouterError, ValueError):
    """The body is longer than this router reads."""

    status = 413
    kind = "invalid_request_error"
    default_code = "body_too_large"


class UnsupportedEncoding(RouterError):
    """The body's Content-Encoding isn't one that is decoded here."""

    status = 415
    kind = "invalid_request_error"
    default_code = "unsupported_content_encoding"


class HeadTooLarge(RouterError):
    """Request line and header fields are longer, or more, than this router reads."""

    status = 431
    kind = "invalid_request_error"
    default_code = "head_too_large"


class Overloaded(RouterError):
    """Workers exist, all are full; trying later helps."""

    status = 429
    kind = "overloaded_error"
    default_code = "overloaded"


class GenerationFailed(RouterError):
    """Every attempt to run the request ended with an error of the worker."""

    status = 500
    kind = "internal_error"
    default_code = "generation_failed"


class NoWorker(RouterError):
    """No worker can serve now; trying later may help."""

    status = 503
    kind = "service_unavailable_error"
    default_code = "no_worker"


class ModelLoadError(Exception):
    """Tokenizer or chat template of the model can't be loaded; the router doesn't start."""


class PortError(Exception):
    """A port can't be opened; the router doesn't start."""
