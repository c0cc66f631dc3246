"""One request before it is sent."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """When it is due, how long prompt and answer are, and what its prompt shares with others.

    The first `shared_tokens` of the prompt are the tokens of `block_ids`, `block_tokens` each;
    the rest is the request's own.
    """

    number: int
    at: float
    """Seconds after the start; 0 in a closed loop."""
    input_tokens: int
    output_tokens: int
    block_ids: tuple[int, ...] = ()
    block_tokens: int = 0
    shared_tokens: int = 0
