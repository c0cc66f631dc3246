"""How a model turns positions into angles."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tandem_wire.model_error import UnsupportedModelError


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary embedding over all of the head's dimensions, halves rotated (NeoX order).

    `linear` divides every frequency by `factor`; `llama3` divides the long waves only, with a
    smooth ramp between `original_max_position` / `high_freq_factor` and / `low_freq_factor`.
    """

    theta: float
    scaling: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192

    def divisor(self, frequency: float) -> float:
        """What to divide an angular frequency (radians per position) by."""
        if self.scaling == "linear":
            return self.factor
        if self.scaling == "default":
            return 1.0
        wavelength = 2 * math.pi / frequency
        if wavelength < self.original_max_position / self.high_freq_factor:
            return 1.0
        if wavelength > self.original_max_position / self.low_freq_factor:
            return self.factor
        span = self.high_freq_factor - self.low_freq_factor
        smooth = (self.original_max_position / wavelength - self.low_freq_factor) / span
        return 1.0 / ((1.0 - smooth) / self.factor + smooth)


def rope_spec(config: Mapping[str, Any], layer_type: str | None, theta: float) -> RopeSpec:
    """The rope of a config.json, in transformers' new form (rope_parameters) or the old ones.

    `layer_type` picks one of several ropes; `theta` is the family's default.

    Raises:
        UnsupportedModelError: a scaling that is not known.
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
    kind = str(parameters.get("rope_type", parameters.get("type", "default")))
    base = float(parameters.get("rope_theta", theta))
    if kind == "default":
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
            int(parameters["original_max_position_embeddings"]),
        )
    raise UnsupportedModelError(
        f"the model scales its positions by {kind!r}", "use default, linear or llama3 scaling"
    )
