"""The router's configuration, fixed at its start."""

from dataclasses import dataclass, field
from typing import Literal

PolicyName = Literal["KvAware", "LeastLoaded", "RoundRobin"]


@dataclass(frozen=True, kw_only=True)
class SloClass:
    """One class of `spec.slo.classes`."""

    name: str
    default: bool = False
    ttft_seconds: float = 0.0  # 0: no objective
    tbt_seconds: float = 0.0  # 0: no objective
    priority: int = 0


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """All settings of one router."""

    model_name: str  # the served name, what requests give as `model`
    model: str  # URI of the model, for tokenizer and chat template
    revision: str = ""
    model_id: str = ""  # with `service`, only pods annotated with tandem.dev/model-id=model_id
    host: str = "0.0.0.0"
    port: int = 8000  # for clients
    metrics_port: int = 0  # for whoever runs the router: /metrics and /state; 0: a free port
    service: str = ""  # watch pods with the label tandem.dev/service=service
    namespace: str = ""  # of those pods; empty: the router's own
    workers: tuple[str, ...] = ()  # static HOST:PORT wire addresses instead of watching
    policy: PolicyName = "LeastLoaded"
    slo_classes: tuple[SloClass, ...] = ()
    api_keys_file: str = ""  # one key a line, or a folder of such files; empty: no key needed
    cors_origins: tuple[str, ...] = ()  # whose pages may call from a browser; "*": all
    drain_seconds: float = 600.0  # how long SIGTERM lets streams finish
    linger_seconds: float = 0.0  # how long SIGTERM still takes requests, until clients know
    queue_seconds: float = 20.0  # how long a request without a worker waits before 429 or 503
    failover_seconds: float = 120.0  # how long a started request waits for another worker
    request_seconds: float = 3600.0  # no request lives longer than this
    max_inflight: int = 8192  # sequences in this router; more are answered 429 at once
    max_body_bytes: int = 32 << 20  # as sent and as decoded
    max_head_bytes: int = 64 << 10  # of request line and header fields
    max_head_lines: int = 128
    body_seconds: float = 120.0  # how long a request may take for its body
    head_seconds: float = 20.0  # how long a connection may take for a request's head
    heartbeat_seconds: float = 1.0
    cache_dir: str = ""  # where converted tokenizers are kept; empty: the user's cache
    router_id: str = field(default="router")

    def slo_class(self, name: str | None) -> SloClass | None:
        """The class with this name, or None; without a name the default one, or else the first."""
        if name is None:
            marked = [candidate for candidate in self.slo_classes if candidate.default]
            return next(iter([*marked, *self.slo_classes]), None)
        return next((candidate for candidate in self.slo_classes if candidate.name == name), None)
