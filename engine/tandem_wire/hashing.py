"""Hashes that routers and workers both compute: prefix blocks, and who may exchange KV."""

import struct
from collections.abc import Sequence

import xxhash


def salt_hash(*parts: str) -> int:
    """64-bit start of a block hash chain: model, revision, dtype, adapter and tenant."""
    return xxhash.xxh3_64_intdigest("\x1f".join(parts).encode())


def block_hash(parent: int, tokens: Sequence[int]) -> int:
    """Hash of one full block of token ids whose prefix has the hash `parent` (xxh3-64)."""
    data = struct.pack(f"<Q{len(tokens)}I", parent, *tokens)
    return xxhash.xxh3_64_intdigest(data)


def prefix_hashes(tokens: Sequence[int], page_size: int, salt: int) -> list[int]:
    """Chained hashes of all full blocks of `tokens`, in order."""
    hashes = []
    parent = salt
    for start in range(0, len(tokens) - page_size + 1, page_size):
        parent = block_hash(parent, tokens[start : start + page_size])
        hashes.append(parent)
    return hashes


def compatibility_hash(**facts: object) -> str:
    """Two workers may exchange KV exactly when these are equal (16 hex digits).

    The facts are protocol, model, model revision, dtype, the layout's fields and the adapter set.
    """
    text = "\x1f".join(f"{key}={facts[key]}" for key in sorted(facts))
    return f"{xxhash.xxh3_64_intdigest(text.encode()):016x}"
