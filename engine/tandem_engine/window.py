"""Layers that see only the last tokens: which blocks of a sequence they need.

A window is the number of tokens that a query sees, itself included; 0: all of them.
"""


def first_seen(position: int, window: int, page_size: int) -> int:
    """The first block that queries from `position` on see."""
    return max(0, position - window + 1) // page_size if window else 0


def first_kept(num_tokens: int, window: int, page_size: int) -> int:
    """The first block of which a hand-off of `num_tokens` tokens moves the layers with a window.

    Decoding needs what the query at `num_tokens` sees. What moves reaches back a little further, so
    that a prompt which comes again, or goes on from here, is found in the cache up to its last full
    block: the query behind that block sees at most one block more.
    """
    return first_seen((num_tokens - 1) // page_size * page_size, window, page_size)
