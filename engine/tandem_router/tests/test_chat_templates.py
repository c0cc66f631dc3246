"""Prompts equal those of transformers, whatever the form in which clients send a history."""

import copy
import json
from pathlib import Path
from typing import Any

import jinja2
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from tandem_router.errors import InvalidRequest, ModelLoadError
from tandem_router.tests.chat_templates import TEMPLATES, TEXT_ONLY, TOOLS
from tandem_router.tests.test_router_text import write_model
from tandem_router.text.chat_template import ChatTemplate
from tandem_router.text.loading import load_directory

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
ARGUMENTS: dict[str, Any] = {"city": "Köln", "days": 2, "when": {"from": "<now>"}}


def theirs(source: str, messages: list[dict[str, Any]], **variables: Any) -> str:
    """The prompt that transformers renders."""
    rendered, _ = render_jinja_template(
        conversations=[copy.deepcopy(messages)],
        chat_template=source,
        **{"add_generation_prompt": True, **SPECIAL, **variables},
    )
    return str(rendered[0])


def ours(source: str, messages: list[dict[str, Any]], **variables: Any) -> str:
    prompt = variables.pop("add_generation_prompt", True)
    return ChatTemplate(source, SPECIAL).render(
        messages, add_generation_prompt=prompt, variables=variables
    )


def history(arguments: Any, content: Any = "", identifier: str = "a1B2c3D4e") -> list[Any]:
    """A conversation with a tool's turn, in transformers' form or in that of the wire."""
    call = {
        "id": identifier,
        "type": "function",
        "function": {"name": "weather", "arguments": arguments},
    }
    return [
        {"role": "system", "content": " Be brief. "},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": content, "tool_calls": [call]},
        {"role": "tool", "content": '{"rain": true}', "tool_call_id": identifier},
        {"role": "assistant", "content": "Rain.", "reasoning": "It says so."},
        {"role": "user", "content": "And tomorrow?"},
    ]


TEXT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi!\n"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\n Hello."},
    {"role": "user", "content": "Bye <b>&</b>"},
]


@pytest.mark.parametrize("family", TEMPLATES)
@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"add_generation_prompt": False},
        {"tools": TOOLS},
        {"enable_thinking": False, "date_string": "26 Jul 2024"},
        {"builtin_tools": ["weather"], "tools_in_user_message": False, "tools": TOOLS},
    ],
    ids=["plain", "no_prompt", "tools", "variables", "builtin"],
)
def test_conversations_render_as_in_transformers(family: str, variables: dict[str, Any]) -> None:
    source = TEMPLATES[family]
    for messages in (TEXT, TEXT[1:], TEXT[:2], TEXT[1:3]):
        assert ours(source, messages, **variables) == theirs(source, messages, **variables)


@pytest.mark.parametrize("family", TEMPLATES)
@pytest.mark.parametrize("space", ["", " ", "\n\n"])
def test_a_continued_message_is_cut_as_in_transformers(family: str, space: str) -> None:
    for content in ("The answer is", " It  is", "x", "<think>\nhm\n</think>\n\n Well,"):
        messages = [*TEXT[:2], {"role": "assistant", "content": content + space}]
        try:
            wanted = theirs(
                TEMPLATES[family],
                messages,
                add_generation_prompt=False,
                continue_final_message=True,
            )
        except ValueError:  # the template changes the message
            with pytest.raises(InvalidRequest, match="continue_final_message: the model's chat"):
                continued(family, messages)
            continue
        assert continued(family, messages) == wanted
        assert wanted.rstrip().endswith(content.strip())


def continued(family: str, messages: list[dict[str, Any]]) -> str:
    return ChatTemplate(TEMPLATES[family], SPECIAL).render(
        messages, add_generation_prompt=False, continue_final_message=True
    )


@pytest.mark.parametrize("family", [name for name in TEMPLATES if name not in TEXT_ONLY])
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_tool_calls_on_the_wire_are_those_of_transformers(family: str, tools: Any) -> None:
    source = TEMPLATES[family]
    written = json.dumps(ARGUMENTS, ensure_ascii=False)
    # DeepSeek's template joins the arguments to the prompt, so it is written for text.
    expected = theirs(source, history(written if family == "deepseek" else ARGUMENTS), tools=tools)
    for arguments in (written, ARGUMENTS, json.dumps(written)):
        for content in ("", None, [], [{"type": "text", "text": ""}]):
            assert ours(source, history(arguments, content), tools=tools) == expected
    absent = history(written)
    del absent[2]["content"]
    absent[4]["tool_calls"] = absent[1]["name"] = None
    assert ours(source, absent, tools=tools) == expected
    absent[4]["tool_calls"] = []
    assert ours(source, absent, tools=tools) == expected


@pytest.mark.parametrize("family", [name for name in TEMPLATES if name not in TEXT_ONLY])
@pytest.mark.parametrize("arguments", ["", None, "null", "{}", '{"city": "Kö', "[1]", "7", '"a"'])
def test_odd_arguments_are_no_reason_to_refuse_a_history(family: str, arguments: Any) -> None:
    prompt = ours(TEMPLATES[family], history(arguments))
    assert "weather" in prompt
    if arguments == '{"city": "Kö' and family != "mistral":
        assert arguments in prompt


def test_arguments_that_are_cut_off_are_written_as_they_are() -> None:
    source = "{{ messages[2].tool_calls[0].function.arguments | tojson }}"
    assert ours(source, history('{"city": "K')) == '{"city": "K'


def test_a_template_that_prints_arguments_gets_json() -> None:
    source = "{% set a = messages[2].tool_calls[0].function.arguments %}{{ a }} {{ '-' ~ a }}"
    assert ours(source, history('{"b": true}')) == '{"b": true} -{"b": true}'


def test_ids_of_any_length_suit_a_template_that_wants_nine_characters() -> None:
    prompt = ours(TEMPLATES["mistral"], history("{}", identifier="call_" + "x" * 24))
    identifier = prompt.partition('"call_id": "')[2].partition('"')[0]
    assert len(identifier) == 9
    assert f'"id": "{identifier}"' in prompt
    kept = ours("{{ messages[3].tool_call_id }}", history("{}", identifier="call_1"))
    assert kept == "call_1"


def test_parts_are_joined_for_templates_that_take_text() -> None:
    parts = [{"type": "text", "text": "Hi "}, {"type": "text", "text": "there"}]
    for source in TEMPLATES.values():
        expected = ours(source, [{"role": "user", "content": "Hi there"}])
        assert ours(source, [{"role": "user", "content": parts}]) == expected
    with pytest.raises(InvalidRequest, match=r"messages\[0\]\.content: only text"):
        ours("", [{"role": "user", "content": [{"type": "image_url"}]}])


@pytest.mark.parametrize(
    "source",
    [
        "a{% generation %}{{ messages[1].content }}{% set x = 1 %}{% endgeneration %}{{ x }}b",
        "{{ tools | tojson(indent=2) }}{{ tools | tojson(ensure_ascii=True, sort_keys=true) }}",
        "{{ tools | tojson(separators=(',', ':')) }}{{ 'ü<&>' | tojson }}",
        "{{ tools is defined }}{{ documents is defined }}{{ documents is none }}{{ pad_token }}",
        "{{ strftime_now('%Y-%m') }}{{ strftime_now(format='%d') }}",
        "{% for m in messages %}{% if loop.index0 == 2 %}{% break %}{% endif %}"
        "{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}{% endfor %}",
        "{% set n = namespace(a=1, self=2) %}{% set n.a = n.a + 1 %}{{ n.a }}{{ n.self }}",
        "{% set d = dict(a=1, **{'b': 2}) %}{{ d | items | list }}{{ dict.fromkeys('ab', 0) }}",
        "  {% if true %}\n  a\n  {% endif %}\n  {#- x #}\nb",
        "{{ bos_token }}{{ messages[4].reasoning_content }}{{ messages[4].thinking }}",
        "{% for d in documents %}{{ d.title }}{% endfor %}{{ messages[0].content.upper() }}",
        "{% macro f(x) %}{{ x * 2 }}{% endmacro %}{{ f(3) }}{{ messages | map(attribute='role')"
        " | join(',') }}",
    ],
)
def test_what_templates_may_use_is_what_transformers_gives_them(source: str) -> None:
    variables = {"tools": TOOLS, "documents": [{"title": "T", "text": "x"}]}
    messages = history(ARGUMENTS)
    assert ours(source, messages, **variables) == theirs(source, messages, **variables)
    if "d.title" not in source and "tools |" not in source:
        assert ours(source, messages) == theirs(source, messages)


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no') }}",
        "{{ messages.append(1) }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ dict.__init__.__globals__ }}",
        "{{ namespace(**{'__x': 1}) }}",
        "{% set n = namespace() %}{% set n._x = 1 %}",
        "{{ messages[9].content.x }}",
        "{{ 1 // 0 }}",
        "{{ [][0] + 1 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_what_transformers_refuses_is_refused(source: str) -> None:
    with pytest.raises((jinja2.TemplateError, ArithmeticError, RecursionError, TypeError)):
        theirs(source, TEXT)
    with pytest.raises(InvalidRequest, match="chat template rejects"):
        ours(source, TEXT)


def test_of_named_templates_the_one_for_tools_renders_tools() -> None:
    named = {"default": "plain", "tool_use": "tools", "rag": "documents"}
    template = ChatTemplate(named, {})
    assert template.render(TEXT) == "plain"
    assert template.render(TEXT, variables={"tools": TOOLS}) == "tools"
    assert ChatTemplate({"only": "one"}, {}).render(TEXT) == "one"
    with pytest.raises(ModelLoadError, match="rag, tool_use, but none is named 'default'"):
        ChatTemplate({"tool_use": "", "rag": ""}, {})


def test_templates_come_from_any_of_the_files_that_hold_them(tmp_path: Path) -> None:
    write_model(tmp_path, pad_token="</s>")
    (tmp_path / "chat_template.json").write_text('{"chat_template": "of the processor"}')
    assert load_directory(tmp_path).template.render(TEXT) == "of the processor"
    listed = [{"name": "default", "template": "{{ pad_token }}"}]
    write_model(tmp_path, pad_token="</s>", chat_template=listed)
    assert load_directory(tmp_path).template.render(TEXT) == "</s>"
    (tmp_path / "chat_template.jinja").write_text("of the file")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("for tools")
    template = load_directory(tmp_path).template
    assert template.render(TEXT) == "of the file"
    assert template.render(TEXT, variables={"tools": TOOLS}) == "for tools"
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").unlink()
    write_model(tmp_path, chat_template=[{"name": "default"}])
    with pytest.raises(ModelLoadError, match="neither text nor a list"):
        load_directory(tmp_path)
