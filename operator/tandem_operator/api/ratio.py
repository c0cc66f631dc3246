"""The ratio of prefill to decode workers, for users and scalers alike."""

from enum import StrEnum
from typing import Annotated, ClassVar

from pydantic import Field

from tandem_operator.api.api_object import ApiObject, Rule


class RatioMode(StrEnum):
    """How the two pools are tied together."""

    FREE = "Free"
    BOUNDED = "Bounded"
    FIXED = "Fixed"


class RatioTerm(ApiObject):
    """A ratio as two whole numbers."""

    prefill: Annotated[int, Field(ge=1, le=1024)]
    """Prefill workers."""
    decode: Annotated[int, Field(ge=1, le=1024)]
    """Decode workers for this number of prefill workers."""


class Ratio(ApiObject):
    """The ratio prefill : decode."""

    mode: RatioMode = RatioMode.FREE
    """Free: each pool on its own; Bounded: within min and max; Fixed: scaling one pool scales the
    other."""
    fixed: RatioTerm | None = None
    """The ratio that Fixed keeps."""
    min: RatioTerm | None = None
    """The smallest share of prefill that Bounded allows."""
    max: RatioTerm | None = None
    """The largest share of prefill that Bounded allows."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "self.mode != 'Fixed' || has(self.fixed)",
            "ratio.fixed is missing, and ratio.mode is Fixed: add fixed: {prefill: 1, decode: 3}",
            ".fixed",
        ),
        Rule(
            "self.mode == 'Fixed' || !has(self.fixed)",
            "ratio.fixed has no effect unless ratio.mode is Fixed: set mode: Fixed or remove fixed",
            ".fixed",
        ),
        Rule(
            "self.mode != 'Bounded' || has(self.min) || has(self.max)",
            "ratio.min and ratio.max are both missing, and ratio.mode is Bounded: add at least one,"
            " like min: {prefill: 1, decode: 6}",
            ".min",
        ),
        Rule(
            "self.mode == 'Bounded' || (!has(self.min) && !has(self.max))",
            "ratio.min and ratio.max have no effect unless ratio.mode is Bounded: set mode: Bounded"
            " or remove them",
            ".mode",
        ),
        Rule(
            "!has(self.min) || !has(self.max) ||"
            " self.min.prefill * self.max.decode <= self.max.prefill * self.min.decode",
            "ratio.min is greater than ratio.max (prefill divided by decode): swap them or lower"
            " min",
            ".min",
        ),
    )
