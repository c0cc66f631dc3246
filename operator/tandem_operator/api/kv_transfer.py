"""The hand-off of KV pages from prefill to decode workers."""

from enum import StrEnum
from typing import Annotated, ClassVar, Final

from pydantic import Field

from tandem_operator.api.api_object import ApiObject, Rule
from tandem_operator.api.refusal import refused_unless
from tandem_operator.names.pods import PORT_WORKER_BOOTSTRAP, PORT_WORKER_HTTP, PORT_WORKER_WIRE
from tandem_operator.names.worker import POD_TRANSPORTS


class TransferBackend(StrEnum):
    """What moves KV pages between workers."""

    AUTO = "Auto"
    SHM = "Shm"
    TCP = "Tcp"
    CUDA_IPC = "CudaIpc"
    NIXL = "Nixl"
    MOONCAKE = "Mooncake"


POD_BACKENDS: Final = tuple(TransferBackend(name) for name in POD_TRANSPORTS)
"""The backends that workers in pods can use."""


class VerifyMode(StrEnum):
    """What a failed transport check means."""

    REQUIRED = "Required"
    REPORT = "Report"
    OFF = "Off"


class TransferVerify(ApiObject):
    """The check that KV really moves, made before the service is Ready."""

    mode: VerifyMode = VerifyMode.REQUIRED
    """Required: Ready waits for the check; Report: only the condition TransportVerified shows it;
    Off: nothing is checked."""
    min_megabytes_per_second: Annotated[int, Field(ge=0, le=1_000_000)] = 500
    """The slowest transfer that passes, in MB/s (10^6 bytes per second)."""


class KvTransfer(ApiObject):
    """How KV pages get from prefill to decode workers."""

    backend: Annotated[
        TransferBackend,
        refused_unless(
            TransferBackend.AUTO, *POD_BACKENDS, because="workers in pods have no other transport"
        ),
    ] = TransferBackend.AUTO
    """What moves the pages; Auto takes the best backend that both sides support, never Mooncake,
    and shows it in status."""
    bootstrap_port: Annotated[int, Field(ge=1, le=65535)] = PORT_WORKER_BOOTSTRAP
    """Port at which workers shake hands before KV moves. On nodes' networks each worker has a port
    of its own instead."""
    chunk_tokens: Annotated[int, Field(ge=16, le=1_048_576)] = 2048
    """Tokens that are prefilled and pushed as one chunk; a multiple of engine.pageSize."""
    local_prefill_tokens: Annotated[int, Field(ge=0, le=1_048_576)] = 128
    """An uncached suffix no longer than this is prefilled by the decode worker itself."""
    lease_seconds: Annotated[int, Field(ge=1, le=600)] = 10
    """How long reserved pages wait for their writer before they are fenced."""
    checksum: bool = True
    """Whether each transfer is checked by a checksum."""
    verify: TransferVerify = TransferVerify()
    """The check that KV really moves, made before the service is Ready."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            f"!(self.bootstrapPort in [{PORT_WORKER_HTTP}, {PORT_WORKER_WIRE}])",
            "kvTransfer.bootstrapPort must not be 8100 or 8101, the worker's http and wire ports:"
            " use 8998 or another free port",
            ".bootstrapPort",
        ),
    )
