"""Chat templates: the model's own Jinja as transformers renders it, or a plain one for base models.

The environment is that of transformers' `render_jinja_template`, to which the tests hold it: what a
template may call, how it is sandboxed, and what is defined when it runs.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tandem_router.errors import InvalidRequest, ModelLoadError
from tandem_router.text.conversation import RawArguments, prepare_messages

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
DEFAULT_NAME: Final = "default"
TOOLS_NAME: Final = "tool_use"
_CONTINUE_MARK: Final = "CONTINUE_FINAL_MESSAGE_TAG "
_RENDER_ERRORS: Final = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What a template can raise; it is the model's code, run on the client's messages."""


class ChatTemplate:
    """Renders messages to the prompt that the model was trained on.

    `is_plain`: the model has no template of its own; its prompt gets a begin-of-sequence token as
    any text does, while a model's own template writes that token itself.
    """

    def __init__(
        self, source: str | Mapping[str, str] | None, special_tokens: Mapping[str, str]
    ) -> None:
        """`source`: one template, or several by name, of which "tool_use" is for requests with
        tools. `special_tokens`: bos_token, eos_token … as the templates name them."""
        self.is_plain = not source
        self._special_tokens = dict(special_tokens)
        sources = {DEFAULT_NAME: source} if isinstance(source, str) else dict(source or {})
        if len(sources) == 1:
            sources = {DEFAULT_NAME: next(iter(sources.values()))}
        if self.is_plain:
            sources = {DEFAULT_NAME: PLAIN_TEMPLATE}
        if DEFAULT_NAME not in sources:
            raise ModelLoadError(
                f"the model has the chat templates {', '.join(sorted(sources))}, but none is named "
                f"{DEFAULT_NAME!r}: name one of them so"
            )
        environment = _build_environment()
        try:
            self._templates = {
                name: environment.from_string(text) for name, text in sources.items()
            }
        except jinja2.TemplateError as error:
            raise ModelLoadError(f"the model's chat template can't be parsed: {error}") from error
        self._short_ids = {name for name, text in sources.items() if _wants_short_ids(text)}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt. Messages may be in OpenAI's wire form; `tools` and `documents` are variables.

        With `continue_final_message` it ends with the last message's content, which stays open.

        Raises:
            InvalidRequest: the template rejects these messages, or one has a part without text, or
                the last one has nothing to continue.
        """
        given = {"tools": None, "documents": None, **(variables or {})}
        name = TOOLS_NAME if given["tools"] is not None else DEFAULT_NAME
        name = name if name in self._templates else DEFAULT_NAME
        prepared = prepare_messages(messages, short_ids=name in self._short_ids)
        last = _continued(prepared[-1].get("content")) if continue_final_message else ""
        if last:
            prepared[-1]["content"] = last + _CONTINUE_MARK
        try:
            text = self._templates[name].render(
                **{
                    **self._special_tokens,
                    **given,
                    "messages": prepared,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except _RENDER_ERRORS as error:
            raise InvalidRequest(
                f"messages: the model's chat template rejects them: {error}", param="messages"
            ) from error
        return _cut_behind(last, text) if last else text


def _continued(content: Any) -> str:
    """The text of the last message, in which an answer begins."""
    if not isinstance(content, str) or not content.strip():
        raise InvalidRequest(
            "continue_final_message: the last message has no text to continue; give it content",
            param="continue_final_message",
        )
    return content


def _cut_behind(last: str, text: str) -> str:
    """The prompt up to the mark behind the last message, as transformers cuts it."""
    at = text.rfind(_CONTINUE_MARK.strip())
    if at < 0 or last.strip() not in text:
        raise InvalidRequest(
            "continue_final_message: the model's chat template changes the last message; "
            "render the conversation yourself and send it to /v1/completions",
            param="continue_final_message",
        )
    # A template that trims messages has trimmed the space behind the mark, too.
    kept = text[at : at + len(_CONTINUE_MARK)] == _CONTINUE_MARK
    return text[:at] if kept else text[:at].rstrip()


def _wants_short_ids(source: str) -> bool:
    """Whether a template takes tool call ids of nine characters only, as Mistral's do."""
    return "|length!=9" in "".join(source.split())


def _build_environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_refuse, strftime_now=_now, dict=_TemplateDict(), namespace=_Namespace
    )
    return environment


class _GenerationBlock(Extension):
    """`{% generation %}`, which marks an assistant's turn for training; here it only shows it."""

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A call, as in transformers: what the body sets is not seen behind it.
        return nodes.CallBlock(self.call_method("_show"), [], [], body).set_lineno(line)

    def _show(self, caller: Callable[[], str]) -> str:
        return caller()


class _TemplateDict:
    """`dict` for templates, without the class's attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """`namespace` for templates, which stores no name that begins with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that `self` can be one of the names
        self, *given = args
        values = dict(*given, **kwargs)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(
            f"a namespace of a chat template can't hold {name!r}: rename it"
        )


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    if isinstance(value, RawArguments):
        return str(value)
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _refuse(message: str) -> str:
    raise jinja2.TemplateError(message)


def _now(pattern: str = "", **named: str) -> str:
    return datetime.now().strftime(named.get("format", pattern))
