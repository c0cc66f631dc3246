"""Service level objectives: classes of requests and their latencies."""

from typing import Annotated, ClassVar

from pydantic import Field

from tandem_operator.api.api_object import ApiObject, Rule, keyed_by


class SloClass(ApiObject):
    """A class of requests with its own latency objectives."""

    name: Annotated[
        str, Field(min_length=1, max_length=63, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
    ]
    """Name by which a request chooses the class (`slo_class`)."""
    default: bool = False
    """Whether requests that name no class belong to this one. If no class is the default, the first
    one is."""
    ttft_milliseconds: Annotated[int, Field(ge=1, le=3_600_000)]
    """Time to first token at the router, in milliseconds."""
    tbt_milliseconds: Annotated[int, Field(ge=1, le=600_000)]
    """Time between tokens at the router, in milliseconds."""
    percentile: Annotated[int, Field(ge=1, le=99)] = 95
    """Percentile at which status.slo shows the class's latencies; autoscaling follows the default
    class at it, unless the policy sets another."""
    priority: Annotated[int, Field(ge=-1000, le=1000)] = 0
    """Priority in the queues; higher goes first."""


_DEFAULT_CLASSES = (
    SloClass(
        name="interactive",
        default=True,
        ttft_milliseconds=2000,
        tbt_milliseconds=50,
        priority=100,
    ),
    SloClass(name="batch", ttft_milliseconds=60_000, tbt_milliseconds=500),
)


class Slo(ApiObject):
    """Service level objectives."""

    classes: Annotated[
        tuple[SloClass, ...],
        Field(min_length=1, max_length=16, json_schema_extra=keyed_by("name")),
    ] = _DEFAULT_CLASSES
    """The classes of requests."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "self.classes.filter(c, c.default).size() <= 1",
            "slo.classes has more than one default class: keep default: true in only one of them",
            ".classes",
        ),
    )

    @property
    def default_class(self) -> SloClass:
        """The class of requests that name none."""
        return next((c for c in self.classes if c.default), self.classes[0])
