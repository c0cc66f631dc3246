"""Latency profiles of the mock runner.

`h100-8b` is fitted to measured figures of an H100 80GB HBM3 with the Llama-3.1-8B shape in bf16
under vLLM 0.26 (2026-11-21): decode steps of 6.46 ms at 1 x 1k, 8.22 at 32 x 1k, 13.54 at
128 x 1k, 20.7 at 256 x 1k, 17.9 at 32 x 8k and 7.95 at 1 x 32k; prefills of 0.0269 s at 1k, 0.2113
at 8k and 1.182 at 32k. `h100-70b` is not measured: it assumes 8.8 times the weights on
four GPUs, so 2.2 times the time.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Final
from urllib.parse import parse_qsl

from tandem_engine.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class MockProfile:
    """How long a step takes and how large the cache is. All times in seconds."""

    name: str
    blocks: int = 4096  # KV blocks
    max_len: int = 32768  # longest sequence in tokens
    vocab: int = 512
    layers: int = 2  # KV layers; 16 bytes of KV per token and layer
    window: int = 0  # tokens that every second layer sees; 0: all
    speed: float = 1.0  # divides every time
    decode_base: float = 0.0  # a step with at least one decode
    decode_per_sequence: float = 0.0
    decode_per_context_token: float = 0.0
    prefill_base: float = 0.0  # a step with at least one prompt chunk
    prefill_per_token: float = 0.0
    prefill_per_token_squared: float = 0.0  # times (end² - start²) of a chunk
    eos: int = 0  # on average one token in `eos` ends a sequence; 0: never

    def step_seconds(self, decodes: list[int], chunks: list[tuple[int, int]]) -> float:
        """Duration of a step with decodes of these context lengths and chunks [start, end)."""
        seconds = 0.0
        if decodes:
            seconds += self.decode_base + self.decode_per_sequence * len(decodes)
            seconds += self.decode_per_context_token * sum(decodes)
        if chunks:
            # The weights are read once per step: the larger of the two bases covers both.
            seconds += self.prefill_base if not decodes else 0.0
            for start, end in chunks:
                seconds += self.prefill_per_token * (end - start)
                seconds += self.prefill_per_token_squared * (end * end - start * start)
        return seconds / self.speed


PROFILES: Final[dict[str, MockProfile]] = {
    "tiny": MockProfile(name="tiny", blocks=512, max_len=8192),
    "h100-8b": MockProfile(
        name="h100-8b",
        blocks=7233,
        max_len=36864,
        decode_base=6.42e-3,
        decode_per_sequence=1.26e-5,
        decode_per_context_token=4.22e-8,
        prefill_base=4.2e-3,
        prefill_per_token=2.173e-5,
        prefill_per_token_squared=4.34e-10,
    ),
    "h100-70b": MockProfile(
        name="h100-70b",
        blocks=8192,
        max_len=36864,
        decode_base=1.41e-2,
        decode_per_sequence=2.8e-5,
        decode_per_context_token=2.64e-8,
        prefill_base=9.2e-3,
        prefill_per_token=4.78e-5,
        prefill_per_token_squared=6.0e-10,
    ),
}

_OVERRIDES: Final = {
    field.name: field.type for field in fields(MockProfile) if field.name != "name"
}


def parse_profile(text: str) -> MockProfile:
    """The profile that `NAME?option=value&...` describes.

    Every field of `MockProfile` but the name is an option; `prefill_ms` and `decode_ms` replace the
    whole prefill or decode model by a constant per step. Raises ConfigError.
    """
    name, _, query = text.partition("?")
    profile = PROFILES.get(name)
    if profile is None:
        raise ConfigError(f"--mock {name!r} is unknown; use one of {', '.join(sorted(PROFILES))}")
    for key, value in parse_qsl(query, keep_blank_values=True):
        try:
            number = float(value)
        except ValueError:
            raise ConfigError(f"--mock: {key}={value!r} is not a number") from None
        if not 0 <= number < math.inf:
            raise ConfigError(f"--mock: {key}={value} makes no sense; use a number from 0 on")
        profile = _with_option(profile, key, number)
    if profile.speed <= 0 or profile.blocks < 1 or profile.layers < 1 or profile.max_len < 2:
        raise ConfigError("--mock: speed, blocks and layers must be positive; max_len at least 2")
    if profile.vocab < 258:
        raise ConfigError("--mock: vocab must be at least 258 (256 bytes, bos, eos)")
    return profile


def _with_option(profile: MockProfile, key: str, value: float) -> MockProfile:
    if key == "prefill_ms":
        return replace(
            profile,
            prefill_base=value / 1e3,
            prefill_per_token=0.0,
            prefill_per_token_squared=0.0,
        )
    if key == "decode_ms":
        return replace(
            profile,
            decode_base=value / 1e3,
            decode_per_sequence=0.0,
            decode_per_context_token=0.0,
        )
    if key not in _OVERRIDES:
        known = ", ".join(sorted([*_OVERRIDES, "prefill_ms", "decode_ms"]))
        raise ConfigError(f"--mock: option {key!r} is unknown; use one of {known}")
    changes: dict[str, float] = {key: int(value) if _OVERRIDES[key] is int else value}
    return replace(profile, **changes)  # type: ignore[arg-type]  # checked by _OVERRIDES
