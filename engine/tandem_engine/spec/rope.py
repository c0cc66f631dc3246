"""How a model turns positions into angles."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tandem_wire.model_error import UnsupportedModelError


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary embedding over all of the head's dimensions.

    `linear` divides every frequency by `factor`; `llama3` divides the long waves only, with a
    smooth ramp between `original_max_position` / `high_freq_factor` and / `low_freq_factor`; `yarn`
    (Peng et al., arXiv 2309.00071) ramps over the pairs of dimensions, between those that turn
    `high_freq_factor` and `low_freq_factor` times in `original_max_position`.
    """

    theta: float
    scaling: Literal["default", "linear", "llama3", "yarn"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    amplitude: float = 1.0
    """Factor by which cosines and sines are multiplied."""
    truncate: bool = True
    """Whether yarn's ramp begins and ends at whole pairs."""

    def divisor(self, frequency: float, head_dim: int) -> float:
        """The number by which an angular frequency (radians per position) is divided."""
        if self.scaling == "linear":
            return self.factor
        if self.scaling == "default":
            return 1.0
        if self.scaling == "yarn":
            return self._yarn_divisor(frequency, head_dim)
        wavelength = 2 * math.pi / frequency
        if wavelength < self.original_max_position / self.high_freq_factor:
            return 1.0
        if wavelength > self.original_max_position / self.low_freq_factor:
            return self.factor
        span = self.high_freq_factor - self.low_freq_factor
        smooth = (self.original_max_position / wavelength - self.low_freq_factor) / span
        return 1.0 / ((1.0 - smooth) / self.factor + smooth)

    def _yarn_divisor(self, frequency: float, head_dim: int) -> float:
        pairs_per_unit = head_dim / (2 * math.log(self.theta))

        def pair_that_turns(times: float) -> float:
            return pairs_per_unit * math.log(self.original_max_position / (times * 2 * math.pi))

        first, last = pair_that_turns(self.high_freq_factor), pair_that_turns(self.low_freq_factor)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        pair = round(-pairs_per_unit * math.log(frequency))
        ramp = min(max((pair - first) / (last - first if last != first else 0.001), 0.0), 1.0)
        return 1.0 / (ramp / self.factor + 1.0 - ramp)


def rope_spec(config: Mapping[str, Any], layer_type: str | None, theta: float) -> RopeSpec:
    """The rope of a config.json, in transformers' new form (rope_parameters) or an old one.

    `layer_type` picks one of several ropes; `theta` is the family's default.

    Raises:
        UnsupportedModelError: the scaling is unknown, or only a part of each head is rotated.
    """
    parameters = config.get("rope_parameters")
    if layer_type is not None and parameters is not None and layer_type in parameters:
        parameters = parameters[layer_type]
    if parameters is None:
        # Old form. Gemma 3's local layers have a base of their own and are never scaled.
        local = layer_type == "sliding_attention"
        base = config.get("rope_local_base_freq" if local else "rope_theta")
        scaling = None if local else config.get("rope_scaling")
        parameters = {**(scaling or {}), "rope_theta": theta if base is None else base}
    part = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if part not in (None, 1.0):
        raise UnsupportedModelError(
            f"the model's config: partial_rotary_factor is {part}, but only 1.0 is supported",
            "use a model that rotates whole heads",
        )
    kind = str(parameters.get("rope_type", parameters.get("type", "default")))
    base = float(parameters.get("rope_theta", theta))
    if kind in ("default", "dynamic"):
        # Dynamic scaling sets in behind max_position_embeddings, where no sequence gets to.
        return RopeSpec(base)
    if kind == "linear":
        return RopeSpec(base, "linear", float(parameters["factor"]))
    if kind == "llama3":
        return RopeSpec(
            base,
            "llama3",
            float(parameters["factor"]),
            float(parameters["low_freq_factor"]),
            float(parameters["high_freq_factor"]),
            _original_max_position(config, parameters),
        )
    if kind == "yarn":
        return _yarn(config, parameters, base)
    raise UnsupportedModelError(
        f"the model's config: rope_type {kind!r} is not supported",
        "use a model with default, dynamic, linear, llama3 or yarn scaling",
    )


def _original_max_position(config: Mapping[str, Any], parameters: Mapping[str, Any]) -> int:
    """The length of the first training. As in transformers the config's own field comes first."""
    name = "original_max_position_embeddings"
    return int(config.get(name) or parameters.get(name) or config["max_position_embeddings"])


def _yarn(config: Mapping[str, Any], parameters: Mapping[str, Any], theta: float) -> RopeSpec:
    longest = int(config["max_position_embeddings"])
    original = _original_max_position(config, parameters)
    factor = float(parameters.get("factor") or longest / original)

    def temperature(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    amplitude = parameters.get("attention_factor")
    if amplitude is None:
        one = float(parameters.get("mscale") or 0.0)
        over_all = float(parameters.get("mscale_all_dim") or 0.0)
        both = one and over_all
        amplitude = temperature(one) / temperature(over_all) if both else temperature(1.0)
    return RopeSpec(
        theta,
        "yarn",
        factor,
        float(parameters.get("beta_slow") or 1.0),
        float(parameters.get("beta_fast") or 32.0),
        original,
        float(amplitude),
        bool(parameters.get("truncate", True)),
    )
