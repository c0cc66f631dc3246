"""The table of what the operator relies on in `tandem-worker`: flags, routes, fields of `/state`.

The operator imports nothing of the engine. `e2e/tests/test_contracts.py` holds this table against
the engine's own definitions.
"""

from typing import Final

FLAG_MODEL: Final = "model"
FLAG_SERVED_MODEL_NAME: Final = "served-model-name"
FLAG_REVISION: Final = "revision"
FLAG_ROLE: Final = "role"
FLAG_HTTP_PORT: Final = "http-port"
FLAG_WIRE_PORT: Final = "wire-port"
FLAG_BOOTSTRAP_PORT: Final = "bootstrap-port"
FLAG_PAGE_SIZE: Final = "page-size"
FLAG_MAX_BATCHED_TOKENS: Final = "max-batched-tokens"
FLAG_MAX_RUNNING: Final = "max-running"
FLAG_MAX_WAITING: Final = "max-waiting"
FLAG_GPU_MEMORY_PERCENT: Final = "gpu-memory-percent"
FLAG_DTYPE: Final = "dtype"
FLAG_FORMAT: Final = "format"
FLAG_DEVICE: Final = "device"
FLAG_TRANSFER: Final = "transfer"
FLAG_CHUNK_TOKENS: Final = "chunk-tokens"
FLAG_LOCAL_PREFILL_TOKENS: Final = "local-prefill-tokens"
FLAG_LEASE_SECONDS: Final = "lease-seconds"
FLAG_DRAIN_SECONDS: Final = "drain-seconds"
FLAG_TENSOR_PARALLEL: Final = "tensor-parallel"
FLAG_MAX_MODEL_LEN: Final = "max-model-len"
FLAG_KV_MEMORY: Final = "kv-memory"
FLAG_CACHE_DIR: Final = "cache-dir"
FLAG_CHECKSUM: Final = "checksum"
FLAG_NO_CHECKSUM: Final = "no-checksum"
FLAG_ADMIN_TOKEN_FILE: Final = "admin-token-file"

TRANSPORTS: Final = ("CudaIpc", "Shm", "Nixl", "Tcp", "Mooncake")
"""The values of --transfer that workers have code for, besides Auto; best first. Auto never takes
Mooncake."""
POD_TRANSPORTS: Final = tuple(name for name in TRANSPORTS if name != "CudaIpc")
"""Those of them that workers in pods can use. A pod that gets its GPU from a device plugin has no
other GPU's device file, so it can't map that GPU's memory."""
RDMA_TRANSPORTS: Final = tuple(name for name in TRANSPORTS if name in ("Nixl", "Mooncake"))
"""Those of them that can use RDMA devices; without one, rdma.mode Auto would take no devices."""
LIBFABRIC_TRANSPORTS: Final[tuple[str, ...]] = ()
"""Those of them that speak libfabric, without which EFA devices are of no use. Until there is one,
rdma.mode Auto takes none of these."""

ROUTE_HEALTH: Final = "/health"
ROUTE_READY: Final = "/ready"
ROUTE_STATE: Final = "/state"
ROUTE_ADMIN: Final = "/admin"
ACTION_DRAIN: Final = "drain"
ACTION_UNDRAIN: Final = "undrain"
ACTION_PROBE: Final = "probe"
ACTION_ROLE: Final = "role"

STATE_ROLE: Final = "role"
STATE_DRAINING: Final = "draining"
STATE_LEASES: Final = "leases"
STATE_RUNNING: Final = "running"
STATE_LOAD: Final = "load"
STATE_COUNTERS: Final = "counters"
STATE_PAIRINGS: Final = "pairings"
STATE_TROUBLES: Final = "troubles"
LOAD_RUNNING: Final = "num_running"
LOAD_WAITING: Final = "num_waiting"
LOAD_FIELDS: Final = (
    "prefill_tokens_per_second",
    "queued_prompt_seconds",
    "num_free_blocks",
    "num_blocks",
    LOAD_RUNNING,
    LOAD_WAITING,
)
"""Fields of `load` that scaling needs; the names are those of `WorkerFigures` too."""
COUNTER_PREFILLED: Final = "prefill_tokens_total"
"""In `counters`: prompt tokens computed since the worker started."""
