"""A model's special tokens, from whichever of its files names them.

Where a generation ends may be known only to `tokenizer_config.json`, to `special_tokens_map.json`
or to a GGUF's vocabulary. Router and worker both read it here, so that they agree.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from tandem_wire.gguf_file import GgufFile
from tandem_wire.model_error import BadModelFileError
from tandem_wire.sentencepiece_file import read_sentencepiece

SENTENCEPIECE_NAME: Final = "tokenizer.model"
SPECIAL_NAMES: Final = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
"""The names by which chat templates know them, in transformers' order."""

GGUF_NAMES: Final[Mapping[str, str]] = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "sep_token": "tokenizer.ggml.seperator_token_id",  # ggml's spelling
    "pad_token": "tokenizer.ggml.padding_token_id",
    "mask_token": "tokenizer.ggml.mask_token_id",
}
_GGUF_ENDS: Final = ("eos_token_id", "eot_token_id", "eom_token_id")
_GGUF_MARKED: Final = (3, 4)  # ggml's token types CONTROL and USER_DEFINED
_END_TEXTS: Final = frozenset(
    {
        "<|eot_id|>",
        "<|eom_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<end_of_turn>",
        "<end_of_utterance>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<eos>",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
    }
)
"""Marked tokens by which llama.cpp, too, ends a generation (`special_eog_ids`)."""


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """`texts` by name (bos_token, eos_token …), and the `ids` of those that have one."""

    texts: Mapping[str, str]
    ids: Mapping[str, int]


Form = TypeVar("Form", "_AddedTokens", "_Vocabulary")


class _AddedToken(msgspec.Struct):
    id: int
    content: str


class _AddedTokens(msgspec.Struct):
    added_tokens: list[_AddedToken] = []


class _Model(msgspec.Struct):
    vocab: dict[str, int] | list[tuple[str, float]] = {}


class _Vocabulary(msgspec.Struct):
    model: _Model = msgspec.field(default_factory=_Model)


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises BadModelFileError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadModelFileError(
            f"{path} can't be read as JSON: {error}", "download the model again"
        ) from error
    if not isinstance(content, dict):
        raise BadModelFileError(f"{path} is not a JSON object", "download the model again")
    return content


def read_special_tokens(folder: Path, token_ids: Mapping[str, int | None]) -> SpecialTokens:
    """The special tokens of a directory in the Hugging Face form.

    `token_ids` are the names whose ids the model's config states; they count where the tokenizer's
    own files are silent about a name. A tokenizer that says null has no such token.

    Raises:
        BadModelFileError: a file is damaged.
    """
    config = _read_if_there(folder / "tokenizer_config.json")
    legacy = _read_if_there(folder / "special_tokens_map.json")
    # As in transformers: the older file wins over a config that doesn't list the added tokens.
    older_wins = "added_tokens_decoder" not in config
    first, second = (legacy, config) if older_wins else (config, legacy)
    texts: dict[str, str] = {}
    for name in SPECIAL_NAMES:
        text = _text_of(first.get(name))
        text = _text_of(second.get(name)) if text is None else text
        if text is not None:
            texts[name] = text
    unnamed = {
        name: number
        for name, number in token_ids.items()
        if number is not None and name not in config and name not in legacy
    }
    pieces = folder / SENTENCEPIECE_NAME
    if pieces.exists() and not (folder / "tokenizer.json").exists():
        file = read_sentencepiece(pieces)
        own = {"bos_token": file.bos_id, "eos_token": file.eos_id}
        unnamed = {
            name: number
            for name, number in {**own, **unnamed}.items()
            if name not in texts and name not in config and number >= 0
        }
    ids = _find_ids(folder, config, set(texts.values()), set(unnamed.values()))
    by_id = {number: text for text, number in ids.items()}
    texts |= {name: by_id[number] for name, number in unnamed.items() if number in by_id}
    return SpecialTokens(texts, {name: ids[text] for name, text in texts.items() if text in ids})


def gguf_special_tokens(file: GgufFile) -> SpecialTokens:
    """The special tokens that a GGUF file's metadata names. Raises GgufError."""
    tokens = file.array("tokenizer.ggml.tokens")
    ids = {
        name: number
        for name, key in GGUF_NAMES.items()
        if (number := file.integer(key)) is not None and 0 <= number < len(tokens)
    }
    return SpecialTokens({name: str(tokens[number]) for name, number in ids.items()}, ids)


def gguf_end_tokens(file: GgufFile) -> list[int]:
    """Ids that end a generation: those that the metadata names, then those by type and text.

    Raises:
        GgufError: a field has another type than it should have.
    """
    named = [file.integer(f"tokenizer.ggml.{name}") for name in _GGUF_ENDS]
    tokens, types = file.array("tokenizer.ggml.tokens"), file.array("tokenizer.ggml.token_type")
    marked = [
        number
        for number, (token, kind) in enumerate(zip(tokens, types, strict=False))
        if kind in _GGUF_MARKED and token in _END_TEXTS
    ]
    return [number for number in named if number is not None] + marked


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.exists() else {}


def _text_of(value: Any) -> str | None:
    """A token's text, written as a string or as an object with `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _find_ids(
    folder: Path, config: Mapping[str, Any], texts: set[str], numbers: set[int]
) -> dict[str, int]:
    """Ids by text for these texts and ids; the whole vocabulary is read only if it must be."""
    found: dict[str, int] = {}

    def add(pairs: Iterable[tuple[str, int]]) -> bool:
        for text, number in pairs:
            if text in texts or number in numbers:
                found.setdefault(text, number)
        return texts <= found.keys() and numbers <= set(found.values())

    listed = config.get("added_tokens_decoder") or {}
    pairs = [(_text_of(entry), int(number)) for number, entry in listed.items()]
    if add((text, number) for text, number in pairs if text is not None):
        return found
    file = folder / "tokenizer.json"
    if file.exists():
        data = file.read_bytes()
        added = _decode(data, _AddedTokens, file).added_tokens
        if add((token.content, token.id) for token in added):
            return found
        vocab = _decode(data, _Vocabulary, file).model.vocab
        pieces = vocab.items() if isinstance(vocab, dict) else _numbered(vocab)
        if add(pieces):
            return found
    elif (folder / SENTENCEPIECE_NAME).exists():
        tokens = read_sentencepiece(folder / SENTENCEPIECE_NAME).tokens
        if add((text, number) for number, text in enumerate(tokens)):
            return found
    for name in ("added_tokens.json", "vocab.json"):
        if add(_read_if_there(folder / name).items()):
            break
    return found


def _numbered(vocab: list[tuple[str, float]]) -> Iterable[tuple[str, int]]:
    return ((text, number) for number, (text, _) in enumerate(vocab))


def _decode(data: bytes, form: type[Form], path: Path) -> Form:
    try:
        return msgspec.json.decode(data, type=form)
    except msgspec.MsgspecError as error:
        raise BadModelFileError(
            f"{path} is not a tokenizer: {error}", "download the model again"
        ) from error
