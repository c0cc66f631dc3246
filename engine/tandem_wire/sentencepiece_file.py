"""Reading SentencePiece's `tokenizer.model`, the only tokenizer file of some older models.

The file is a protocol buffer, `ModelProto` of sentencepiece's `sentencepiece_model.proto`. Its few
fields are read here, because neither sentencepiece nor protobuf is needed for anything else: text
is encoded by `tokenizers`.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tandem_wire.model_error import BadModelFileError, UnsupportedModelError

_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3  # fields of ModelProto
_TEXT, _SCORE, _TYPE = 1, 2, 3  # fields of a piece
_MODEL_TYPE, _BOS_ID, _EOS_ID = 3, 41, 42  # fields of TrainerSpec
_ADD_DUMMY_PREFIX: Final = 3  # a field of NormalizerSpec
_BPE: Final = 2  # a value of model_type; 1, the default, is unigram


@dataclass(frozen=True, slots=True)
class SentencePieceFile:
    """Pieces by id, with scores and types (whose numbers are ggml's, too).

    `adds_prefix`: a blank is put before a text. A `bos_id` or `eos_id` below 0: there is none.
    """

    tokens: tuple[str, ...]
    scores: tuple[float, ...]
    types: tuple[int, ...]
    adds_prefix: bool
    bos_id: int
    eos_id: int


def read_sentencepiece(path: Path) -> SentencePieceFile:
    """Read a tokenizer.model.

    Raises:
        BadModelFileError: the file is no SentencePiece model, or is cut short.
        UnsupportedModelError: the model is not a BPE.
    """
    tokens: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    try:
        for field, value in _fields(path.read_bytes()):
            if not isinstance(value, bytes):
                continue
            if field == _PIECES:
                piece = dict(_fields(value))
                tokens.append(_bytes(piece.get(_TEXT, b"")).decode())
                scores.append(struct.unpack("<f", _bytes(piece.get(_SCORE, bytes(4))))[0])
                types.append(_integer(piece.get(_TYPE, 1)))
            elif field == _TRAINER:
                trainer = dict(_fields(value))
            elif field == _NORMALIZER:
                normalizer = dict(_fields(value))
    except (ValueError, IndexError, struct.error) as error:
        raise BadModelFileError(
            f"{path} is not a SentencePiece model: {error}", "download the model again"
        ) from error
    if not tokens:
        raise BadModelFileError(f"{path} has no pieces", "download the model again")
    if trainer.get(_MODEL_TYPE, 1) != _BPE:
        raise UnsupportedModelError(
            f"{path} is a SentencePiece model of another type than BPE",
            "convert the tokenizer to tokenizer.json with transformers",
        )
    return SentencePieceFile(
        tokens=tuple(tokens),
        scores=tuple(scores),
        types=tuple(types),
        adds_prefix=bool(normalizer.get(_ADD_DUMMY_PREFIX, 1)),
        bos_id=_integer(trainer.get(_BOS_ID, 1)),
        eos_id=_integer(trainer.get(_EOS_ID, 2)),
    )


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Numbers and values of a message's fields; of a fixed-width one, its bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        size = {1: 8, 5: 4}.get(kind, 0)
        if kind == 2:
            size, at = _varint(data, at)
        elif not size:
            raise ValueError(f"wire type {kind} at byte {at}")
        if at + size > len(data):
            raise ValueError(f"a field of {size} bytes at byte {at} runs past the end")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if not byte & 0x80:
            return value, at
        if shift > 63:
            raise ValueError(f"a number before byte {at} is too long")


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, bytes):
        return value
    raise ValueError(f"a number, {value}, where bytes should be")


def _integer(value: int | bytes) -> int:
    """A signed number; negative ones are written as 64 bits."""
    if isinstance(value, bytes):
        raise ValueError("bytes where a number should be")
    return value - (1 << 64) if value >> 63 else value
