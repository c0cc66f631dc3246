"""From a model's URI to its tokenizer and chat template."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from tokenizers import AddedToken, Tokenizer

from tandem_router.errors import ModelLoadError
from tandem_router.text.chat_template import DEFAULT_NAME, ChatTemplate
from tandem_router.text.gguf_vocabulary import (
    WHOLE_WORDS,
    build_gguf_tokenizer,
    build_sentencepiece_tokenizer,
)
from tandem_router.text.model import TextModel
from tandem_router.text.tokenizer import ByteTokenizer, HFTokenizer
from tandem_wire.disk_cache import build_once, default_cache_dir
from tandem_wire.gguf_file import GgufError, GgufFile, file_identity, read_gguf
from tandem_wire.model_config import facts_of_gguf, read_model_facts
from tandem_wire.model_source import ModelSourceError, resolve_model
from tandem_wire.sentencepiece_file import read_sentencepiece
from tandem_wire.special_tokens import SENTENCEPIECE_NAME, read_json_object

MOCK_SCHEME: Final = "mock://"
_CONVERSION: Final = 2
"""Raised when `build_gguf_tokenizer` makes something else of the same file."""


def load_text_model(uri: str, *, revision: str = "", cache_dir: str = "") -> TextModel:
    """Tokenizer and template of the model; downloads only the small files of a repository.

    Raises ModelLoadError, naming what is missing.
    """
    if uri.startswith(MOCK_SCHEME):
        tokenizer = ByteTokenizer()
        return TextModel(tokenizer, ChatTemplate(None, {}), tokenizer.vocab_size)
    cache = Path(cache_dir) if cache_dir else default_cache_dir()
    try:
        files = resolve_model(uri, revision=revision, weights=False, cache_dir=cache)
        if files.format == "Gguf":
            return load_gguf(files.path, cache)
        return load_directory(files.path)
    except (ModelSourceError, GgufError, OSError) as error:
        raise ModelLoadError(f"{uri}: {error}") from error


def load_directory(path: Path) -> TextModel:
    """A directory in the Hugging Face form: tokenizer.json or .model, its config, templates."""
    if not any((path / name).exists() for name in ("tokenizer.json", SENTENCEPIECE_NAME)):
        raise ModelLoadError(
            f"{path} has neither tokenizer.json nor {SENTENCEPIECE_NAME}: convert the model's "
            "tokenizer to tokenizer.json"
        )
    config_file = path / "tokenizer_config.json"
    config = read_json_object(config_file) if config_file.exists() else {}
    facts = read_model_facts(path)
    special = facts.special_tokens.texts
    adds_bos = config.get("add_bos_token")
    if (path / "tokenizer.json").exists():
        backend = _open_tokenizer(path / "tokenizer.json")
    else:
        is_gemma = facts.architecture.startswith("gemma")
        backend = _open_sentencepiece(path, config, is_gemma=is_gemma)
        adds_bos = True if adds_bos is None else adds_bos  # as in transformers
    tokenizer = HFTokenizer(
        backend,
        bos_token=special.get("bos_token"),
        adds_bos=bool(adds_bos) if adds_bos is not None else None,
    )
    template = _read_templates(path) or _named_templates(config, config_file)
    processor = path / "chat_template.json"  # the older form of multimodal models
    if not template and processor.exists():
        template = _named_templates(read_json_object(processor), processor)
    return TextModel(tokenizer, ChatTemplate(template, special), facts.vocab_size)


def load_gguf(path: Path, cache: Path) -> TextModel:
    """A GGUF file; its tokenizer is converted once and kept in the cache."""
    file = read_gguf(path)
    tokenizer_file = _converted(file, cache)
    facts = facts_of_gguf(file)
    special = facts.special_tokens.texts
    # llama.cpp adds it to these vocabularies where the file doesn't say otherwise.
    adds_bos = (
        file.text("tokenizer.ggml.model") == "llama"
        or file.text("tokenizer.ggml.pre") in WHOLE_WORDS
    )
    tokenizer = HFTokenizer(
        _open_tokenizer(tokenizer_file),
        bos_token=special.get("bos_token"),
        adds_bos=bool(file.metadata.get("tokenizer.ggml.add_bos_token", adds_bos)),
    )
    template = ChatTemplate(_gguf_templates(file), special)
    return TextModel(tokenizer, template, facts.vocab_size)


def _converted(file: GgufFile, cache: Path) -> Path:
    """The cached tokenizer.json of a GGUF file, made at first use."""
    identity = f"{_CONVERSION} {file_identity(file.path)}"
    name = hashlib.sha256(identity.encode()).hexdigest()[:24]
    folder = cache / "tokenizers"
    return build_once(
        folder / f"{name}.json", lambda target: build_gguf_tokenizer(file).save(str(target), False)
    )


def _open_tokenizer(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for whatever is wrong
        raise ModelLoadError(f"{path} can't be read as a tokenizer: {error}") from error


def _open_sentencepiece(folder: Path, config: Mapping[str, Any], *, is_gemma: bool) -> Tokenizer:
    """A tokenizer.model, and the tokens that the files beside it add."""
    file = read_sentencepiece(folder / SENTENCEPIECE_NAME)
    legacy = bool(config.get("legacy", False))
    tokenizer = build_sentencepiece_tokenizer(file, is_gemma=is_gemma, legacy=legacy)
    listed = folder / "added_tokens.json"
    added: dict[int, dict[str, Any]] = {
        int(number): {"content": text, "special": True}
        for text, number in (read_json_object(listed) if listed.exists() else {}).items()
    }
    added |= {
        int(number): entry for number, entry in (config.get("added_tokens_decoder") or {}).items()
    }
    for number, entry in sorted(added.items()):
        token = AddedToken(
            entry["content"],
            special=bool(entry.get("special", False)),
            normalized=bool(entry.get("normalized", False)),
            lstrip=bool(entry.get("lstrip", False)),
            rstrip=bool(entry.get("rstrip", False)),
        )
        add = tokenizer.add_special_tokens if token.special else tokenizer.add_tokens
        add([token])
        if tokenizer.token_to_id(token.content) != number:
            raise ModelLoadError(
                f"{folder}: the added token {token.content!r} has the id {number}, but the next "
                "free one is another: convert the tokenizer to tokenizer.json"
            )
    return tokenizer


def _read_templates(folder: Path) -> dict[str, str]:
    """Templates that are files of their own, by name."""
    found = {
        file.stem: file.read_text(encoding="utf-8")
        for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))
    }
    single = folder / "chat_template.jinja"
    if single.exists():
        found[DEFAULT_NAME] = single.read_text(encoding="utf-8")
    return found


def _named_templates(holder: Mapping[str, Any], place: Path) -> dict[str, str]:
    """By name, from the one template or the list of several that `chat_template` holds."""
    value = holder.get("chat_template")
    if isinstance(value, str) and value:
        return {DEFAULT_NAME: value}
    try:
        return {str(entry["name"]): str(entry["template"]) for entry in value or []}
    except (KeyError, TypeError) as error:
        raise ModelLoadError(
            f"{place}: chat_template is neither text nor a list of name and template"
        ) from error


def _gguf_templates(file: GgufFile) -> dict[str, str]:
    names = [str(name) for name in file.array("tokenizer.chat_templates")]
    found = {name: file.text(f"tokenizer.chat_template.{name}") for name in names}
    found[DEFAULT_NAME] = file.text("tokenizer.chat_template")
    return {name: text for name, text in found.items() if text}
