"""Fields that take several forms, such as a prompt: text, texts, token ids or lists of them."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema

MAX_STOPS = 16


def json_schema(*types: dict[str, Any]) -> WithJsonSchema:
    """What /openapi.json says of a field that takes several forms."""
    return WithJsonSchema({"anyOf": list(types)})


TEXT = {"type": "string"}
TEXTS = {"type": "array", "items": TEXT, "minItems": 1}
IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
ID_LISTS = {"type": "array", "items": IDS, "minItems": 1}


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
    json_schema(TEXT, {**TEXTS, "minItems": 0, "maxItems": MAX_STOPS}),
]


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
_TEXT_FORMS = json_schema(TEXT, TEXTS)
_ID_FORMS = json_schema(IDS, ID_LISTS)
_ALL_FORMS = json_schema(TEXT, TEXTS, IDS, ID_LISTS)
Prompts = Annotated[list[Any], BeforeValidator(_prompts), _MANY, _ALL_FORMS]
Texts = Annotated[list[Any], BeforeValidator(_texts), _MANY, _TEXT_FORMS]
IdLists = Annotated[list[Any], BeforeValidator(_id_lists), _MANY, _ID_FORMS]
