"""Chat templates: the model's own Jinja, in a sandbox, or a plain one for base models."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tandem_router.errors import InvalidRequest, ModelLoadError

PLAIN_TEMPLATE: Final = (
    "{%- for message in messages -%}"
    "{%- if message.role == 'system' -%}{{ message.content ~ '\n\n' }}"
    "{%- else -%}{{ message.role | capitalize ~ ': ' ~ message.content ~ '\n' }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}Assistant:{%- endif -%}"
)
"""For models without a template. A base model continues with the user's turn after its answer, so
`PLAIN_STOP` ends it there."""
PLAIN_STOP: Final = ("\nUser:",)


class ChatTemplate:
    """Renders messages to the prompt that the model was trained on.

    `is_plain`: the model has no template of its own; its prompt gets a begin-of-sequence token as
    any text does, while a model's own template writes that token itself.
    """

    def __init__(self, source: str | None, special_tokens: Mapping[str, str]) -> None:
        """`special_tokens`: bos_token, eos_token … as the templates name them."""
        self.is_plain = source is None
        self._special_tokens = dict(special_tokens)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _now
        try:
            self._template = environment.from_string(source or PLAIN_TEMPLATE)
        except jinja2.TemplateError as error:
            raise ModelLoadError(f"the model's chat template can't be parsed: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt. Raises InvalidRequest when the template rejects these messages."""
        try:
            return self._template.render(
                **{
                    **self._special_tokens,
                    **(variables or {}),
                    "messages": messages,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise InvalidRequest(
                f"messages: the model's chat template rejects them: {error}", param="messages"
            ) from error


def _to_json(value: Any, indent: int | None = None, **_: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> str:
    raise jinja2.TemplateError(message)


def _now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
