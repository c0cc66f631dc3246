"""AutoscalingPolicy: how both pools follow the load."""

from enum import StrEnum
from typing import Annotated, ClassVar

from pydantic import Field

from tandem_operator.api.api_object import ApiObject, Rule, keyed_by
from tandem_operator.api.conditions import Conditions
from tandem_operator.api.model import ResourceName
from tandem_operator.api.refusal import refused_unless
from tandem_operator.pair import Pair


class PolicyMode(StrEnum):
    """Whether decisions are carried out."""

    ACTIVE = "Active"
    ADVISORY = "Advisory"


class SignalSource(StrEnum):
    """Where measurements come from."""

    ROUTER = "Router"
    PROMETHEUS = "Prometheus"


class OnStale(StrEnum):
    """What to do while measurements are stale."""

    HOLD = "Hold"


class ForecastModel(StrEnum):
    """How future demand is estimated."""

    TREND = "Trend"
    LAST = "Last"


class CoordinationMode(StrEnum):
    """How the two pools are decided together."""

    BOTTLENECK = "Bottleneck"
    RATIO = "Ratio"
    INDEPENDENT = "Independent"


class HoldMode(StrEnum):
    """How long an idle worker is kept."""

    RENT_OR_BUY = "RentOrBuy"
    FIXED = "Fixed"


class VictimMode(StrEnum):
    """Which worker is removed first."""

    LEAST_CACHED = "LeastCached"
    NEWEST = "Newest"


class OnDeadline(StrEnum):
    """What to do with pods that stay pending."""

    WITHDRAW = "Withdraw"
    KEEP = "Keep"


class Objectives(ApiObject):
    """The latencies to keep; a field that is not set comes from the service's default SLO class."""

    ttft_milliseconds: Annotated[int, Field(ge=1, le=3_600_000)] | None = None
    """Time to first token, in milliseconds."""
    tbt_milliseconds: Annotated[int, Field(ge=1, le=600_000)] | None = None
    """Time between tokens, in milliseconds."""
    percentile: Annotated[int, Field(ge=1, le=99)] | None = None
    """Percentile of requests for which both must hold."""
    attainment_percent: Annotated[
        int,
        Field(ge=1, le=100),
        refused_unless(99, because="decisions follow latencies and queues, not attainment"),
    ] = 99
    """Share of time in which they must hold."""


_NO_PROMETHEUS = "the operator measures routers and workers itself"
_NO_FORECAST = "decisions follow what is measured, without a forecast"


class Signals(ApiObject):
    """Where measurements come from and when they are too old."""

    source: Annotated[SignalSource, refused_unless(SignalSource.ROUTER, because=_NO_PROMETHEUS)] = (
        SignalSource.ROUTER
    )
    """Router: read from routers and workers directly; Prometheus: ask a Prometheus server."""
    prometheus_url: Annotated[
        str, Field(max_length=1024), refused_unless("", because=_NO_PROMETHEUS)
    ] = ""
    """URL of the Prometheus server, for source Prometheus."""
    stale_seconds: Annotated[int, Field(ge=1, le=3600)] = 30
    """Age in seconds at which measurements count as stale."""
    on_stale: OnStale = OnStale.HOLD
    """What to do while measurements are stale: Hold keeps every pool as it is."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "self.source != 'Prometheus' || self.prometheusUrl.startsWith('http://') ||"
            " self.prometheusUrl.startsWith('https://')",
            "signals.prometheusUrl must be an http:// or https:// URL with signals.source"
            " Prometheus: set it, or set source: Router",
            ".prometheusUrl",
        ),
    )


class Forecast(ApiObject):
    """How demand is estimated for the moment at which new workers would be ready."""

    model: Annotated[ForecastModel, refused_unless(ForecastModel.LAST, because=_NO_FORECAST)] = (
        ForecastModel.LAST
    )
    """Trend: from the level and the trend of the last values; Last: the last value."""
    quantile_percent: Annotated[
        int, Field(ge=1, le=99), refused_unless(90, because=_NO_FORECAST)
    ] = 90
    """Quantile of the forecast to plan for."""
    horizon_seconds: Annotated[
        int, Field(ge=0, le=3600), refused_unless(0, because=_NO_FORECAST)
    ] = 0
    """How far to look ahead; 0: the measured p90 start-up time plus one tick."""


_BOUNDS = Rule(
    "self.min <= self.max",
    "min is greater than max in pools: lower min or raise max",
    ".min",
)


class PoolBounds(ApiObject):
    """Bounds and steps of one pool."""

    min: Annotated[int, Field(ge=0, le=1024)] = 1
    """The fewest workers."""
    max: Annotated[int, Field(ge=1, le=1024)] = 8
    """The most workers."""
    max_step_up: Annotated[int, Field(ge=1, le=1024)] = 4
    """Workers that one decision may add."""

    rules: ClassVar[tuple[Rule, ...]] = (_BOUNDS,)


class DecodePoolBounds(PoolBounds):
    """Bounds and steps of the decode pool."""

    kv_ceiling_percent: Annotated[int, Field(ge=10, le=99)] = 85
    """KV use above which the pool counts as full."""


class PolicyPools(ApiObject):
    """Bounds and steps of both pools."""

    prefill: PoolBounds = PoolBounds()
    """Bounds of the prefill pool."""
    decode: DecodePoolBounds = DecodePoolBounds()
    """Bounds of the decode pool."""

    @property
    def pair(self) -> Pair[PoolBounds]:
        """The bounds of both pools."""
        return Pair(self.prefill, self.decode)


class Coordination(ApiObject):
    """How the two pools are decided together."""

    mode: Annotated[
        CoordinationMode,
        refused_unless(
            CoordinationMode.BOTTLENECK,
            CoordinationMode.INDEPENDENT,
            because="spec.ratio is kept in every mode",
        ),
    ] = CoordinationMode.BOTTLENECK
    """Bottleneck: grow the pool that limits the other; Ratio: keep spec.ratio; Independent: each on
    its own."""
    gpu_budget: Annotated[int, Field(ge=0, le=65_536)] = 0
    """GPUs that both pools together may use; 0: no limit."""


class ScaleIn(ApiObject):
    """When workers are removed, and which."""

    hold: HoldMode = HoldMode.RENT_OR_BUY
    """RentOrBuy: keep an idle worker until its idle cost equals its restart cost; Fixed:
    minHoldSeconds."""
    min_hold_seconds: Annotated[int, Field(ge=0, le=86_400)] = 60
    """The shortest time that a worker is kept idle."""
    victim: Annotated[
        VictimMode,
        refused_unless(VictimMode.LEAST_CACHED, because="the cheapest worker to drain always goes"),
    ] = VictimMode.LEAST_CACHED
    """Which worker is removed first: LeastCached takes the one with the least resident work and
    useful cache, Newest the newest."""


class Startup(ApiObject):
    """What to do with workers that are slow to start."""

    pending_deadline_seconds: Annotated[int, Field(ge=1, le=86_400)] = 900
    """How long a pod may stay pending."""
    on_deadline: OnDeadline = OnDeadline.WITHDRAW
    """Withdraw: undo the growth and report it; Keep: continue to wait."""
    warmup_samples_ignored: Annotated[
        int, Field(ge=0, le=10_000), refused_unless(0, because="every measurement counts")
    ] = 0
    """How many of the first measurements of a new worker are ignored."""


class Standby(ApiObject):
    """Workers kept in addition to what the demand needs."""

    prefill: Annotated[int, Field(ge=0, le=1024)] = 0
    """Prefill workers kept in addition to what the demand needs."""
    decode: Annotated[int, Field(ge=0, le=1024)] = 0
    """Decode workers kept in addition to what the demand needs."""


class Burst(ApiObject):
    """What to do about load that rises faster than workers start."""

    standby: Standby = Standby()
    """Workers kept in addition to what the demand needs."""
    shed: Annotated[
        bool, refused_unless(False, because="routers refuse only when queues are full")
    ] = False
    """Whether routers refuse requests that can't meet their SLO while pools grow."""


class ScaleToZero(ApiObject):
    """Whether an idle service may have no workers at all."""

    enabled: bool = False
    """Whether both pools go to zero when idle, whatever their min."""
    idle_seconds: Annotated[int, Field(ge=60, le=604_800)] = 1800
    """How long without a request counts as idle."""


class AutoscalingPolicySpec(ApiObject):
    """How both pools follow the load, in one decision per tick."""

    mode: PolicyMode = PolicyMode.ACTIVE
    """Active: decisions are carried out; Advisory: they are only published in status."""
    objectives: Objectives = Objectives()
    """The latencies to keep; default: the service's default SLO class."""
    signals: Signals = Signals()
    """Where measurements come from and when they are too old."""
    forecast: Forecast = Forecast()
    """How future demand is estimated."""
    pools: PolicyPools = PolicyPools()
    """Bounds and steps of both pools."""
    coordination: Coordination = Coordination()
    """How the two pools are decided together."""
    role_change: Annotated[bool, refused_unless(False, because="workers keep their roles")] = False
    """Whether a decision may change the role of warm workers before it starts pods."""
    scale_in: ScaleIn = ScaleIn()
    """When workers are removed, and which."""
    startup: Startup = Startup()
    """What to do with workers that are slow to start."""
    burst: Burst = Burst()
    """What to do about load that rises faster than workers start."""
    scale_to_zero: ScaleToZero = ScaleToZero()
    """Whether an idle service may have no workers at all."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "self.coordination.gpuBudget == 0 || self.pools.prefill.min + self.pools.decode.min"
            " <= self.coordination.gpuBudget",
            "coordination.gpuBudget is smaller than pools.prefill.min plus pools.decode.min: raise"
            " the budget, lower a min, or set gpuBudget: 0 for no limit",
            ".coordination.gpuBudget",
        ),
        Rule(
            "self.pools.prefill.min + self.burst.standby.prefill <= self.pools.prefill.max",
            "burst.standby.prefill doesn't fit between pools.prefill.min and pools.prefill.max:"
            " lower standby or raise max",
            ".burst.standby.prefill",
        ),
        Rule(
            "self.pools.decode.min + self.burst.standby.decode <= self.pools.decode.max",
            "burst.standby.decode doesn't fit between pools.decode.min and pools.decode.max: lower"
            " standby or raise max",
            ".burst.standby.decode",
        ),
    )


class PolicyTarget(ApiObject):
    """A service that this policy scales."""

    name: Annotated[str, Field(min_length=1, max_length=63)]
    """Name of the InferenceService."""
    last_decision: Annotated[str, Field(max_length=1024)] | None = None
    """The last decision in one sentence."""
    conditions: Conditions = ()
    """Whether the policy works for this service, and what holds it back."""


class AutoscalingPolicyStatus(ApiObject):
    """What the policy does, per service."""

    targets: Annotated[
        tuple[PolicyTarget, ...], Field(max_length=256, json_schema_extra=keyed_by("name"))
    ] = ()
    """The services that this policy scales."""


class Autoscaling(ApiObject):
    """The policy that scales both pools: one by name, or one written here."""

    policy_name: ResourceName | None = None
    """Name of an AutoscalingPolicy in the service's namespace."""
    inline: AutoscalingPolicySpec | None = None
    """A policy for this service only, written like the spec of an AutoscalingPolicy."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "has(self.policyName) != has(self.inline)",
            "autoscaling needs exactly one of policyName and inline: set one of them, or remove"
            " autoscaling to scale by hand",
        ),
    )
