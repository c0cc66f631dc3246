"""The engine that workers run: image, page size, options, environment."""

from typing import Annotated, Any, ClassVar

from pydantic import Field

from tandem_operator.api.api_object import ApiObject, Rule, keyed_by
from tandem_operator.api.quantity import Quantity
from tandem_operator.names.pods import ENV_FAULTS, ENV_PREFIX

_PRESERVED: dict[str, Any] = {"x-kubernetes-preserve-unknown-fields": True}


class EngineOptions(ApiObject):
    """Named engine options. An option that is not set has the engine's default."""

    kv_memory: Quantity | None = None
    """Memory of the KV cache per worker, like 2Gi; default: what gpuMemoryPercent leaves, 2Gi on
    CPU."""
    num_threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """CPU threads for computing; default: the container's CPU limit."""
    max_waiting: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Requests that may wait in a worker before further ones are refused; default: four
    times maxRunning."""


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
            f"!self.name.startsWith('{ENV_PREFIX}') || self.name == '{ENV_FAULTS}'",
            "engine.env must not set TANDEM_* variables, which the operator writes: rename the"
            " variable, or set the field that it stands for",
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
