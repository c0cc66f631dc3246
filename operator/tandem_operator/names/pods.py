"""The table of containers, ports and environment variables of worker and router pods."""

from typing import Final

ENGINE_CONTAINER: Final = "engine"
ROUTER_CONTAINER: Final = "router"
MEMLOCK_CONTAINER: Final = "memlock"
"""The init container that reports the memlock limit."""

PORT_ROUTER_HTTP: Final = 8000
PORT_ROUTER_METRICS: Final = 8001
"""Of /metrics and /state, which are not for clients."""
PORT_WORKER_HTTP: Final = 8100
PORT_WORKER_WIRE: Final = 8101
PORT_WORKER_BOOTSTRAP: Final = 8998
NODE_PORTS_WORKER: Final = range(20000, 28000)
NODE_PORTS_ROUTER: Final = range(28000, 30000)
"""Where pods on their node's network get ports: below NodePorts (from 30000) and below what Linux
gives to outgoing connections (from 32768)."""
PORT_NAME_HTTP: Final = "http"
PORT_NAME_WIRE: Final = "wire"
PORT_NAME_METRICS: Final = "metrics"
PORT_NAME_BOOTSTRAP: Final = "bootstrap"

VOLUME_ADMIN_TOKEN: Final = "admin-token"
"""The volume with the Secret of the admin token."""
ADMIN_TOKEN_FOLDER: Final = "/etc/tandem/admin"
ADMIN_TOKEN_ENTRY: Final = "token"

ENV_PREFIX: Final = "TANDEM_"
"""Variables with this prefix belong to the operator; engine.env must not set them."""
ENV_POD_NAME: Final = "POD_NAME"
ENV_POD_IP: Final = "POD_IP"
ENV_CACHE_DIR: Final = "TANDEM_CACHE_DIR"
ENV_SHM_DIR: Final = "TANDEM_SHM_DIR"
ENV_NICS: Final = "TANDEM_NICS"
ENV_NIC_MAP: Final = "TANDEM_NIC_MAP"
ENV_FAULTS: Final = "TANDEM_FAULTS"
"""What goes wrong in a test worker's hand-offs: the one variable of ENV_PREFIX that users set."""
ENV_FAULTS_ALLOWED: Final = "TANDEM_FAULTS_ALLOWED"
"""The value of LABEL_FAULTS, without which a worker refuses ENV_FAULTS."""
