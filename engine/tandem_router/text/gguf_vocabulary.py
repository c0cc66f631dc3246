"""A tokenizer from the vocabulary that a GGUF file or a SentencePiece model carries.

Two families, by `tokenizer.ggml.model`: "llama" is a SentencePiece BPE without its merges (they
follow from the vocabulary), "gpt2" a byte-level BPE with them. What a GGUF doesn't say, the
normalizer, pre-tokenizer and decoder, is a fact of each family's published `tokenizer.json`.
"""

from collections.abc import Mapping, Sequence
from typing import Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from tandem_router.errors import ModelLoadError
from tandem_wire.gguf_file import GgufFile
from tandem_wire.sentencepiece_file import SentencePieceFile

BLANK: Final = "\u2581"
CONTROL: Final = 3  # token types of ggml
USER_DEFINED: Final = 4

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS: Final[Mapping[str, str]] = {
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _TEKKEN,
}
"""How text is cut before merging, by `tokenizer.ggml.pre`; others use GPT-2's own pattern."""
WHOLE_WORDS: Final = frozenset({"llama3", "llama-v3", "llama-bpe", "tekken"})
"""Vocabularies in which a word that is a token is never merged from others. A prompt begins with
their begin-of-sequence token if the file doesn't say otherwise, as in llama.cpp."""
COMPOSED: Final = frozenset({"qwen2"})
"""Vocabularies for text in Unicode's composed form (NFC)."""


def build_gguf_tokenizer(file: GgufFile) -> Tokenizer:
    """The tokenizer that this file describes. Raises ModelLoadError for an unknown family."""
    family = file.text("tokenizer.ggml.model")
    tokens = [str(token) for token in file.array("tokenizer.ggml.tokens")]
    if not tokens:
        raise ModelLoadError(f"{file.path} has no vocabulary")
    if family == "llama":
        is_gemma = file.text("general.architecture").startswith("gemma")
        tokenizer = _build_gemma(tokens) if is_gemma else _build_gguf_llama(file, tokens)
    elif family == "gpt2":
        tokenizer = _build_byte_level(file, tokens)
    else:
        raise ModelLoadError(
            f"{file.path} has a tokenizer of family {family!r}, but only 'llama' and 'gpt2' are "
            "supported"
        )
    types = [int(kind) for kind in file.array("tokenizer.ggml.token_type")]
    _add_special_tokens(tokenizer, tokens, types)
    return tokenizer


def build_sentencepiece_tokenizer(
    file: SentencePieceFile, *, is_gemma: bool, legacy: bool = False
) -> Tokenizer:
    """The tokenizer of a tokenizer.model; GGUF's "llama" family holds the same facts.

    `legacy`: the blank is put before the text behind each special token, too.
    """
    scheme = ("always" if legacy else "first") if file.adds_prefix else "never"
    tokens = list(file.tokens)
    tokenizer = _build_gemma(tokens) if is_gemma else _build_llama(tokens, file.scores, scheme)
    _add_special_tokens(tokenizer, tokens, file.types)
    return tokenizer


def _build_gemma(tokens: list[str]) -> Tokenizer:
    """Runs of blanks are stored as blanks; merge order is the order of the file, not the score."""
    tokens = [BLANK * len(token) if token and not token.strip(" ") else token for token in tokens]
    rank = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.BPE(
            vocab=rank,
            merges=derive_merges(tokens, rank),
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", BLANK)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def _build_gguf_llama(file: GgufFile, tokens: list[str]) -> Tokenizer:
    scores = [float(score) for score in file.array("tokenizer.ggml.scores")]
    if len(scores) != len(tokens):
        raise ModelLoadError(f"{file.path} has {len(tokens)} tokens but {len(scores)} scores")
    prefix = bool(file.metadata.get("tokenizer.ggml.add_space_prefix", True))
    return _build_llama(tokens, scores, "first" if prefix else "never")


def _build_llama(tokens: list[str], scores: Sequence[float], scheme: str) -> Tokenizer:
    rank = {
        token: -score for token, score in zip(tokens, scores, strict=True)
    }  # the best score merges first
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=derive_merges(tokens, rank),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement=BLANK, prepend_scheme=scheme, split=False
    )
    steps = [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    if scheme != "never":
        steps.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _build_byte_level(file: GgufFile, tokens: list[str]) -> Tokenizer:
    merges = []
    for merge in file.array("tokenizer.ggml.merges"):
        left, _, right = str(merge).partition(" ")
        merges.append((left, right))
    kind = file.text("tokenizer.ggml.pre")
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=kind in WHOLE_WORDS))
    if kind in COMPOSED:
        tokenizer.normalizer = normalizers.NFC()
    split = SPLITS.get(kind)
    if split is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(split), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def derive_merges(tokens: list[str], rank: Mapping[str, float]) -> list[tuple[str, str]]:
    """Every way to build a token from two others, in merge order.

    `rank` orders the results, least first. Pairs that build the same token come in descending
    lengths of their halves, as the converters of the published tokenizers put them.
    """
    known = {token: index for index, token in enumerate(tokens)}
    found: list[tuple[float, int, int, int, int, str, str]] = []
    for token, value in rank.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in known and right in known:
                order = (value, -len(left), -len(right), known[left], known[right])
                found.append((*order, left, right))
    found.sort()
    return [(left, right) for *_, left, right in found]


def _add_special_tokens(tokenizer: Tokenizer, tokens: list[str], types: Sequence[int]) -> None:
    kinds = list(zip(tokens, types, strict=False))
    tokenizer.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True)
            for token, kind in kinds
            if kind == CONTROL
        ]
    )
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=False)
            for token, kind in kinds
            if kind == USER_DEFINED and tokenizer.token_to_id(token) is not None
        ]
    )
