"""Everything the router can answer instead of tokens.

    RouterError
    ├── InvalidRequest     400, names the parameter (a ValueError)
    ├── Unauthorized       401
    ├── NotFound           404, unknown model or path
    ├── MethodNotAllowed   405
    ├── RequestTooLong     413 (a ValueError)
    ├── Overloaded         429, Retry-After
    ├── GenerationFailed   500, a worker failed and no other could go on
    └── NoWorker           503, Retry-After
ModelLoadError (the tokenizer can't be loaded) ends the process instead.
"""

from typing import ClassVar

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


class RequestTooLong(RouterError, ValueError):
    """Prompt and output together can never fit the model."""

    status = 413
    kind = "invalid_request_error"
    default_code = "context_length_exceeded"


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
