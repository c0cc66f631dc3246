"""The engine that workers run: image, page size, options, environment."""

from enum import StrEnum
from typing import Annotated, Any, ClassVar

from pydantic import Field

from tandem_operator.api.api_object import ApiObject, Rule
from tandem_operator.api.merge import keyed_by
from tandem_operator.api.quantity import Quantity

_PRESERVED: dict[str, Any] = {"x-kubernetes-preserve-unknown-fields": True}


class AttentionBackend(StrEnum):
    """Which attention kernels run."""

    AUTO = "Auto"
    TRITON = "Triton"
    TORCH = "Torch"


class Preemption(StrEnum):
    """What happens to a request that must give its pages up."""

    RECOMPUTE = "Recompute"
    OFFLOAD = "Offload"


class LogLevel(StrEnum):
    """How much a worker logs."""

    DEBUG = "Debug"
    INFO = "Info"
    WARNING = "Warning"
    ERROR = "Error"


class EngineOptions(ApiObject):
    """Named engine options; an option that is not set has the engine's own default."""

    attention_backend: AttentionBackend | None = None
    """Which attention kernels run; Auto takes Triton on a GPU and Torch on a CPU."""
    prefix_caching: bool | None = None
    """Whether prompts reuse the KV of equal prefixes (default true)."""
    cuda_graphs: bool | None = None
    """Whether decode steps run as CUDA graphs (default true on a GPU)."""
    overlap_scheduling: bool | None = None
    """Whether the next step is planned while this one runs (default true)."""
    preemption: Preemption | None = None
    """What happens to a request that must give its pages up."""
    kv_memory: Quantity | None = None
    """Memory of the KV cache per worker, like 2Gi; default: what gpuMemoryPercent leaves, 2Gi on
    CPU."""
    num_threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """CPU threads for computing; default: the container's CPU limit."""
    max_waiting: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Requests that may wait before further ones are refused."""
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    """Seed of dummy weights and of sampling without a seed of its own."""
    log_level: LogLevel | None = None
    """How much the worker logs."""


class EnvVar(ApiObject):
    """One environment variable of the engine container."""

    name: Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[A-Za-z_][A-Za-z0-9_.-]*$")]
    """Name of the variable."""
    value: Annotated[str, Field(max_length=32768)] | None = None
    """Literal value."""
    value_from: Annotated[dict[str, Any], Field(json_schema_extra=_PRESERVED)] | None = None
    """Source of the value, as in a pod (configMapKeyRef, secretKeyRef, fieldRef,
    resourceFieldRef)."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!self.name.startsWith('TANDEM_')",
            "engine.env must not set TANDEM_* variables, which the operator writes: rename the"
            " variable or use the field that it stands for",
            ".name",
        ),
        Rule(
            "!(has(self.value) && has(self.valueFrom))",
            "engine.env has an entry with both value and valueFrom: remove one of them",
        ),
    )


class Engine(ApiObject):
    """The engine that every worker runs."""

    image: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    """Container image of the workers; default: the one that the operator was installed with."""
    page_size: Annotated[int, Field(ge=1, le=256)] = 64
    """Tokens per KV page; a power of two, the same in every worker of the service."""
    options: EngineOptions = EngineOptions()
    """Named engine options; unknown names are refused."""
    env: Annotated[
        tuple[EnvVar, ...], Field(max_length=128, json_schema_extra=keyed_by("name"))
    ] = ()
    """Environment variables added to the engine container."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "self.pageSize in [1, 2, 4, 8, 16, 32, 64, 128, 256]",
            "engine.pageSize must be a power of two: set it to 16, 32, 64, 128 or 256",
            ".pageSize",
        ),
    )
