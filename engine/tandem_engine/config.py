"""Configuration of one worker: flags and environment in, one frozen value out."""

import argparse
import os
import secrets
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, NoReturn, get_args

from tandem_engine.errors import ConfigError
from tandem_engine.faults import read_faults
from tandem_wire.handoff import TransportChoice
from tandem_wire.messages import Role

Dtype = Literal["Auto", "BFloat16", "Float16", "Float32"]
WeightFormat = Literal["Auto", "Safetensors", "Gguf", "Dummy"]
Device = Literal["auto", "cpu", "cuda"]

MODEL_SCHEMES: Final = ("hf://", "file://", "package://", "mock://")
_UNITS: Final = {
    "Ki": 2**10,
    "Mi": 2**20,
    "Gi": 2**30,
    "Ti": 2**40,
    "k": 10**3,
    "M": 10**6,
    "G": 10**9,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """Everything that a worker knows from its start. A port of 0 means "take a free one"."""

    model: str  # hf://org/name[@rev] | file:///dir-or-gguf | package://NAME | mock://PROFILE
    served_model_name: str = ""  # the name that clients use; empty: taken from the URI
    revision: str = ""  # model revision; part of the compatibility hash and of every block hash
    role: Role = "both"  # a scheduling preference, may change at run time
    host: str = "0.0.0.0"  # address to listen on
    http_port: int = 8100  # admin and metrics
    wire_port: int = 8101  # routers
    bootstrap_port: int = 8998  # decode workers that ask for KV
    page_size: int = 64  # tokens per KV page
    max_model_len: int = 0  # tokens of prompt and output together; 0: what the model allows
    max_batched_tokens: int = 2048  # token positions computed per step
    max_running: int = 256  # sequences that hold KV for decoding (fetching ones included)
    max_waiting: int = 0  # queued sequences before `no_room`; 0: four times max_running
    tensor_parallel: int = 1  # GPUs (processes on a CPU) among which the model is divided
    gpu_memory_percent: int = 90  # share of device memory for weights, activations and KV
    kv_memory_bytes: int = (
        0  # KV cache size, all ranks together; 0: 2 GiB on a CPU, what is left on a GPU
    )
    dtype: Dtype = "Auto"  # of weights, activations and KV
    format: WeightFormat = "Auto"  # of the weight files
    device: Device = "auto"
    cuda_graphs: bool = True  # steps on a GPU as CUDA graphs
    transfer: TransportChoice = "Auto"  # KV transport; Auto: the best that both sides can do
    chunk_tokens: int = 2048  # prompt tokens computed between two pushes of KV
    local_prefill_tokens: int = 128  # uncached suffixes up to this long are never sent away
    lease_seconds: float = 10.0  # how long KV is kept for a silent peer
    checksum: bool = True  # checksum KV on its way
    cache_dir: str = ""  # converted weights; empty: ~/.cache/tandem
    drain_seconds: float = 600.0  # longest drain after SIGTERM
    worker_id: str = ""  # POD_NAME, or hostname-pid
    boot_id: str = ""  # changes with every start of the process
    pod_ip: str = ""  # POD_IP: the address to publish; empty: the listening address
    shm_dir: str = ""  # TANDEM_SHM_DIR: directory shared by the pods of one node
    faults: str = ""  # TANDEM_FAULTS: what goes wrong in this worker's hand-offs; for tests
    admin_token_file: str = ""  # holds what callers of /admin must send; empty: none may call it

    @property
    def is_mock(self) -> bool:
        """Whether a latency model stands in for the model."""
        return self.model.startswith("mock://")

    @property
    def mock_profile(self) -> str:
        """The text after `mock://`, for example `h100-8b?speed=10`."""
        return self.model.removeprefix("mock://") if self.is_mock else ""

    @property
    def publish_host(self) -> str:
        """The address that peers should connect to."""
        if self.pod_ip:
            return self.pod_ip
        return "127.0.0.1" if self.host in ("0.0.0.0", "::", "") else self.host

    def resolve_auto(self, environ: Mapping[str, str]) -> "WorkerConfig":
        """A new config in which everything that only needs the environment is decided.

        Raises ConfigError.
        """
        name = self.served_model_name
        if not name:
            name = self.model.split("://", 1)[-1].split("?", 1)[0].split("@", 1)[0].rstrip("/")
            if not self.model.startswith("hf://"):
                name = name.rsplit("/", 1)[-1]
        cache_dir = self.cache_dir or environ.get("TANDEM_CACHE_DIR", "")
        return replace(
            self,
            served_model_name=name,
            max_waiting=self.max_waiting or 4 * self.max_running,
            cache_dir=cache_dir or os.path.expanduser("~/.cache/tandem"),
            worker_id=self.worker_id
            or environ.get("POD_NAME", "")
            or f"{socket.gethostname()}-{os.getpid()}",
            boot_id=self.boot_id or secrets.token_hex(8),
            pod_ip=self.pod_ip or environ.get("POD_IP", ""),
            shm_dir=self.shm_dir or environ.get("TANDEM_SHM_DIR", ""),
            faults=self.faults or read_faults(environ),
        )


def read_admin_token(path: str) -> bytes:
    """The token in --admin-token-file. Raises ConfigError when there is none to read."""
    try:
        token = Path(path).read_bytes().strip()
    except OSError as error:
        raise ConfigError(
            f"--admin-token-file {path} can't be read ({error.strerror}); mount it, or give "
            "another file"
        ) from None
    if not token:
        raise ConfigError(f"--admin-token-file {path} is empty; write the token into it")
    return token


def parse_bytes(text: str) -> int:
    """Bytes of a Kubernetes quantity such as `2Gi`, `512Mi` or `1000000`."""
    unit = next((unit for unit in _UNITS if text.endswith(unit)), "")
    number, factor = text.removesuffix(unit), _UNITS.get(unit, 1)
    try:
        value = int(float(number) * factor)
    except ValueError:
        raise ConfigError(f"{text!r} is not a size; write for example 2Gi or 512Mi") from None
    if value <= 0:
        raise ConfigError(f"{text!r} is not a positive size; write for example 2Gi or 512Mi")
    return value


_RANGES: Final[tuple[tuple[tuple[str, ...], float, float, str], ...]] = (
    (("http_port", "wire_port", "bootstrap_port"), 0, 65535, "use 0 for a free port"),
    (("page_size", "max_running", "chunk_tokens"), 1, 2**20, "leave it out for the default"),
    (("tensor_parallel",), 1, 64, "use the number of the worker's GPUs"),
    (("max_batched_tokens",), 1, 2**24, "leave it out for the default"),
    (("max_model_len", "max_waiting"), 0, 2**31, "use 0 or leave it out"),
    (("local_prefill_tokens",), 0, 2**31, "use 0 to send every prompt away"),
    (("gpu_memory_percent",), 1, 100, "90 is a good start"),
    (("lease_seconds",), 0.01, 86400, "10 is a good start"),
    (("drain_seconds",), 0, 2**31, "600 is a good start"),
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="tandem-worker",
        description="One Tandem worker: token ids in, token ids out.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", default="", metavar="URI", help="hf://, file://, package:// or mock://PROFILE")
    add("--mock", default="", metavar="PROFILE", help="short for --model mock://PROFILE")
    add("--served-model-name", default="", metavar="N", help="the name that clients use")
    add("--revision", default="", help="model revision")
    add("--role", choices=get_args(Role), default="both", help="scheduling preference")
    add("--host", default="0.0.0.0", help="address to listen on")
    add("--http-port", type=int, default=8100, help="admin and metrics (0: a free port)")
    add("--wire-port", type=int, default=8101, help="routers (0: a free port)")
    add("--bootstrap-port", type=int, default=8998, help="KV hand-off (0: a free port)")
    add(
        "--admin-token-file",
        default="",
        metavar="FILE",
        help="a file with the token of /admin (without one, /admin is refused)",
    )
    add("--page-size", type=int, default=64, help="tokens per KV page")
    add("--max-model-len", type=int, default=0, help="prompt and output tokens (0: the model's)")
    add("--max-batched-tokens", type=int, default=2048, help="token positions per step")
    add("--max-running", type=int, default=256, help="sequences that decode at once")
    add("--max-waiting", type=int, default=0, help="queued sequences (0: 4 x max-running)")
    add(
        "--tensor-parallel", type=int, default=1, metavar="N", help="GPUs to divide the model among"
    )
    add("--gpu-memory-percent", type=int, default=90, help="share of GPU memory to use")
    add("--kv-memory", default="", metavar="SIZE", help="KV cache (CPU: 2Gi, GPU: what is left)")
    add("--dtype", choices=get_args(Dtype), default="Auto", help="of weights and KV")
    add("--format", choices=get_args(WeightFormat), default="Auto", help="of the weight files")
    add("--device", choices=get_args(Device), default="auto", help="where the model runs")
    add(
        "--cuda-graphs",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="run steps on a GPU as CUDA graphs",
    )
    add("--transfer", choices=get_args(TransportChoice), default="Auto", help="KV transport")
    add("--chunk-tokens", type=int, default=2048, help="prompt tokens between two pushes")
    add("--local-prefill-tokens", type=int, default=128, help="suffixes up to here stay here")
    add("--lease-seconds", type=float, default=10.0, help="patience with a silent peer")
    add("--checksum", action=argparse.BooleanOptionalAction, default=True, help="check KV bytes")
    add("--cache-dir", default="", metavar="DIR", help="converted weights")
    add("--drain-seconds", type=float, default=600.0, help="longest drain after SIGTERM")
    return parser


def flag_names() -> frozenset[str]:
    """Every flag of `tandem-worker` as one writes it, such as `--model` and `--no-checksum`."""
    actions = _build_parser()._actions
    return frozenset(name for action in actions for name in action.option_strings)


def parse_args(argv: Sequence[str], environ: Mapping[str, str] | None = None) -> WorkerConfig:
    """The configuration that `argv` (without the program's name) and the environment describe.

    Raises ConfigError with a message that names the flag and the remedy. `--help` prints and exits.
    """
    values: dict[str, Any] = vars(_build_parser().parse_args(list(argv)))
    mock = values.pop("mock")
    if mock and values["model"]:
        raise ConfigError("--mock and --model exclude each other; drop one of them")
    if mock:
        values["model"] = f"mock://{mock}"
    try:
        kv_memory = values.pop("kv_memory")
        values["kv_memory_bytes"] = parse_bytes(kv_memory) if kv_memory else 0
    except ConfigError as error:
        raise ConfigError(f"--kv-memory: {error}") from None
    config = WorkerConfig(**values)
    check_config(config)
    return config.resolve_auto(os.environ if environ is None else environ)


def check_config(config: WorkerConfig) -> None:
    """Raise ConfigError for the first value that makes no sense."""
    if not config.model:
        raise ConfigError("--model is missing; give hf://, file://, package:// or mock://PROFILE")
    if not config.model.startswith(MODEL_SCHEMES):
        schemes = ", ".join(MODEL_SCHEMES)
        raise ConfigError(f"--model {config.model!r} has no known scheme; use one of {schemes}")
    for names, low, high, remedy in _RANGES:
        for name in names:
            value = getattr(config, name)
            if not low <= value <= high:
                raise ConfigError(
                    f"{_flag(name)} is {value}, but must be {low} to {high}; {remedy}"
                )
    if config.admin_token_file:
        read_admin_token(config.admin_token_file)
    page = config.page_size
    if config.chunk_tokens % page:
        raise ConfigError(
            f"--chunk-tokens is {config.chunk_tokens}, but must be a multiple of --page-size "
            f"({page}); use {-(-config.chunk_tokens // page) * page}"
        )
    if config.max_batched_tokens < page:
        raise ConfigError(
            f"--max-batched-tokens is {config.max_batched_tokens}, but must be at least "
            f"--page-size; use {page} or more"
        )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
