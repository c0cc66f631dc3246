"""Attention over paged KV."""

from tandem_kernels.attention.reference import decode_attention, extend_attention, write_kv

__all__ = ["decode_attention", "extend_attention", "write_kv"]
