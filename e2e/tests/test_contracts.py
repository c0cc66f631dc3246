"""What the operator writes and reads of workers and routers, held against their own definitions.

The operator imports neither of them, so it has tables of their flags, routes, metrics and fields in
`tandem_operator/names`. Here the real parsers take the operator's flags, and the operator's client
reads what real processes answer.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args
from urllib.parse import urlsplit

import msgspec
import pytest

from tandem_engine import faults
from tandem_engine.config import MODEL_SCHEMES, WeightFormat, WorkerConfig, parse_args
from tandem_engine.config import Dtype as EngineDtype
from tandem_engine.frames import Pairing, PairTrouble, ProbeResult
from tandem_engine.handoff.transports.registry import BUILT
from tandem_engine.metrics import METRICS
from tandem_engine.server.api import Path as WorkerPath
from tandem_engine.server.api import ProbeAnswer, StateAnswer
from tandem_operator.api import InferenceServiceSpec
from tandem_operator.api.kv_transfer import POD_BACKENDS, KvTransfer, TransferBackend
from tandem_operator.api.model import Dtype, ModelFormat
from tandem_operator.api.model_uri import ModelScheme
from tandem_operator.api.rdma import RdmaMode
from tandem_operator.api.refusal import refusal_of
from tandem_operator.api.router import RouterPolicy
from tandem_operator.clients.workers import WorkerClient, read_state
from tandem_operator.facts.worker import LinkTrouble
from tandem_operator.manifests.revision import model_id_of
from tandem_operator.manifests.router import router_args
from tandem_operator.manifests.storage import build_storage
from tandem_operator.manifests.wiring import Wiring
from tandem_operator.manifests.worker import Blueprint, worker_args
from tandem_operator.names import annotations, labels, pods, router, worker
from tandem_operator.observe.histogram import parse
from tandem_operator.pair import Role
from tandem_operator.plan.links import backend_named
from tandem_operator.tests.facts import make_observed, make_spec
from tandem_router.config import PolicyName, RouterConfig
from tandem_router.discovery import pods as discovery
from tandem_router.main import build_parser, parse_config, parse_slo_classes
from tandem_router.metrics import RouterMetrics
from tandem_wire.handoff import TRANSPORT_CHOICES, TransportChoice, TransportName
from tandem_wire.messages import WorkerState
from tests.process_fleet import Fleet, running_fleet

EVERYTHING: dict[str, Any] = {
    "model": {
        "uri": "hf://org/name",
        "name": "chat",
        "maxModelLen": 4096,
        "dtype": "BFloat16",
    },
    "prefill": {"tensorParallel": 2, "resources": {"limits": {"nvidia.com/gpu": 2}}},
    "decode": {"tensorParallel": 2, "resources": {"limits": {"nvidia.com/gpu": 2}}},
    "engine": {"pageSize": 32, "options": {"kvMemory": "2Gi", "maxWaiting": 12}},
    "kvTransfer": {"checksum": False},
    "router": {"apiKeysSecretName": "keys", "corsOrigins": ["https://app.example", "*"]},
}
TOKEN = "contract"
ADMIN_TOKEN_FILE = f"{pods.ADMIN_TOKEN_FOLDER}/{pods.ADMIN_TOKEN_ENTRY}"


def flags_of(table: Any) -> set[str]:
    """The flags in a table of names."""
    return {f"--{flag}" for name, flag in vars(table).items() if name.startswith("FLAG_")}


def worker_flags(spec: InferenceServiceSpec, role: Role) -> list[str]:
    made = Blueprint(role, "chat-decode-abc", "r1", Wiring(RdmaMode.NONE))
    return worker_args("chat", spec, made, build_storage(spec.model))


def router_flags(spec: InferenceServiceSpec) -> list[str]:
    observed = make_observed(spec)
    return router_args(observed, spec, build_storage(spec.model).uri)


@pytest.fixture(scope="module")
def token_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("admin") / "token"
    path.write_text(TOKEN)
    return str(path)


@pytest.mark.parametrize("role", list(Role))
def test_the_worker_takes_the_operators_flags(role: Role, token_file: str) -> None:
    def parsed(spec: InferenceServiceSpec) -> WorkerConfig:
        args = worker_flags(spec, role)
        args[args.index(ADMIN_TOKEN_FILE)] = token_file
        return parse_args(args, {})

    config = parsed(make_spec(**EVERYTHING))
    assert (config.role, config.page_size, config.tensor_parallel) == (str(role), 32, 2)
    assert (config.served_model_name, config.revision) == ("chat", "r1")
    assert (config.kv_memory_bytes, config.max_waiting) == (2 * 2**30, 12)
    assert config.checksum is False
    assert config.admin_token_file == token_file
    assert parsed(make_spec()).checksum is True


def test_the_operator_offers_the_transports_that_the_worker_knows() -> None:
    assert [str(backend) for backend in TransferBackend] == list(get_args(TransportChoice))


@pytest.mark.parametrize(
    ("offered", "known"),
    [(ModelFormat, WeightFormat), (Dtype, EngineDtype), (RouterPolicy, PolicyName)],
)
def test_every_admitted_choice_is_one_that_the_processes_know(offered: Any, known: Any) -> None:
    assert [str(value) for value in offered] == list(get_args(known))


def test_only_transports_that_workers_have_are_admitted() -> None:
    built = list(dict.fromkeys(TRANSPORT_CHOICES[transport.name] for transport in BUILT))
    assert list(worker.TRANSPORTS) == built
    assert [str(backend) for backend in POD_BACKENDS] == list(worker.POD_TRANSPORTS)
    assert set(worker.POD_TRANSPORTS) <= set(built)
    mark = refusal_of(KvTransfer, "backend")
    assert mark is not None
    assert [str(backend) for backend in mark.accepts] == ["Auto", *worker.POD_TRANSPORTS]
    assert set(worker.RDMA_TRANSPORTS) <= set(built)


def test_only_locations_that_workers_read_are_given_to_them() -> None:
    rest = {"pvc": "claim/a", "file": "/a", "oci": "image", "package": "a", "mock": "tiny"}
    for scheme in set(ModelScheme) - {ModelScheme.S3}:  # the CRD refuses it
        spec = make_spec(model={"uri": f"{scheme}://{rest.get(scheme, 'org/name')}"})
        assert build_storage(spec.model).uri.startswith(MODEL_SCHEMES)


def test_every_flag_of_the_worker_table_is_written_somewhere() -> None:
    written = {
        arg
        for spec in (make_spec(), make_spec(**EVERYTHING))
        for arg in worker_flags(spec, Role.PREFILL)
    }
    assert flags_of(worker) <= written


def test_the_worker_serves_what_the_operator_asks_for() -> None:
    asked = {worker.ROUTE_HEALTH, worker.ROUTE_READY, worker.ROUTE_STATE}
    actions = [value for name, value in vars(worker).items() if name.startswith("ACTION_")]
    asked |= {f"{worker.ROUTE_ADMIN}/{action}" for action in actions}
    assert asked <= set(WorkerPath)
    fields = {value for name, value in vars(worker).items() if name.startswith("STATE_")}
    assert fields <= set(StateAnswer.__struct_fields__)
    assert set(worker.LOAD_FIELDS) <= set(WorkerState.__struct_fields__)
    assert worker.COUNTER_PREFILLED in METRICS


def test_the_operator_reads_what_a_worker_says_of_its_links() -> None:
    told = {
        "pairings": [Pairing(worker_id="p", side="decode", transport="cudaIpc")],
        "troubles": [
            PairTrouble(
                worker_id="p",
                address="10.0.0.1:8998",
                transport="cudaIpc",
                num_faults=3,
                out_of_use=True,
                reason="checksum",
            )
        ],
    }
    links = read_state(msgspec.json.decode(msgspec.json.encode(told))).links
    assert links.transports == {"p": "cudaIpc"}
    assert links.troubles == (LinkTrouble("p", 3, out_of_use=True, reason="checksum"),)
    assert backend_named("cudaIpc") is TransferBackend.CUDA_IPC
    assert [backend_named(name) for name in get_args(TransportName)].count(None) == 0


def test_the_operator_reads_what_a_probe_answers() -> None:
    result = ProbeResult(
        number=1, transport="tcp", num_bytes=8, seconds=2.0, latency_seconds=0.25, error="x"
    )
    answer = msgspec.json.decode(msgspec.json.encode(ProbeAnswer.of(result)))
    assert {"transport", "passedOver", "bytes", "seconds", "latencySeconds", "error"} <= set(answer)


def test_the_router_takes_the_operators_flags(tmp_path: Path) -> None:
    args = router_flags(make_spec(**EVERYTHING))
    assert flags_of(router) <= set(args)
    keys = tmp_path / "keys"
    keys.mkdir()
    (keys / "one").write_text("secret")
    args[args.index(f"--{router.FLAG_API_KEYS_FILE}") + 1] = str(keys)
    config = parse_config(build_parser().parse_args(args))
    mine = model_id_of(make_spec(**EVERYTHING))
    assert (config.model_name, config.model_id, config.port) == ("chat", mine, 8000)
    assert config.metrics_port == pods.PORT_ROUTER_METRICS
    assert config.api_keys_file == str(keys)
    assert [entry.name for entry in config.slo_classes] == ["interactive", "batch"]
    assert config.cors_origins == ("https://app.example", "*")


def test_the_router_counts_what_the_operator_reads() -> None:
    args = router_flags(make_spec())
    classes = parse_slo_classes(args[args.index(f"--{router.FLAG_SLO_CLASSES}") + 1])
    metrics = RouterMetrics(
        RouterConfig(model_name="chat", model="mock://tiny", slo_classes=classes)
    )
    for ttft, gap in ((0.01, 0.001), (100.0, 10.0)):  # objectives kept, and broken
        metrics.ttft("interactive", ttft)
        metrics.tbt("interactive", gap)
        metrics.sequence_done("interactive", 10, 0, 2, [gap])
    metrics.request_done("interactive", 200, 1.0)
    metrics.inflight(3)
    page = parse(metrics.exposition().decode(), 0.0)
    of_class = {router.METRIC_LABEL_CLASS: "interactive"}
    assert max(page.buckets(router.METRIC_TTFT, **of_class).values()) == 2
    assert max(page.buckets(router.METRIC_TBT, **of_class).values()) == 2
    assert page.total(router.METRIC_REQUESTS) == 1
    assert page.total(router.METRIC_INFLIGHT) == 3
    for objective in router.OBJECTIVES:
        wanted = {**of_class, router.METRIC_LABEL_OBJECTIVE: objective}
        assert page.total(router.METRIC_ATTAINED, **wanted) == 1
        assert page.total(router.METRIC_MISSED, **wanted) == 1


def test_the_router_finds_workers_by_the_operators_labels() -> None:
    assert discovery.SERVICE_LABEL == labels.LABEL_SERVICE
    assert discovery.REVISION_LABEL == labels.LABEL_REVISION
    assert discovery.MODEL_ANNOTATION == annotations.ANNOTATION_MODEL
    assert discovery.ROLE_LABEL == labels.LABEL_ROLE
    assert discovery.DRAINING_ANNOTATION == annotations.ANNOTATION_DRAINING


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, token_file: str) -> Iterator[Fleet]:
    folder, flag = tmp_path_factory.mktemp("contract"), f"--{worker.FLAG_ADMIN_TOKEN_FILE}"
    with running_fleet(folder, "mock://tiny", flag, token_file) as fleet:
        yield fleet


def port_of(url: str) -> int:
    return urlsplit(url).port or 0


async def test_the_client_reads_a_worker_and_a_router(fleet: Fleet) -> None:
    workers, port = WorkerClient(), port_of(fleet.workers["d"])
    state = await workers.state("127.0.0.1", port)
    text = await workers.metrics("127.0.0.1", port_of(fleet.monitor))
    await workers.close()
    assert state is not None
    assert state.figures is not None
    assert state.figures.num_blocks > 0
    assert (state.role, state.draining, state.num_leases) == (str(Role.DECODE), False, 0)
    assert fleet.state_of("d").keys() >= {
        worker.STATE_ROLE,
        worker.STATE_DRAINING,
        worker.STATE_LEASES,
        worker.STATE_RUNNING,
        worker.STATE_LOAD,
        worker.STATE_COUNTERS,
    }
    assert text is not None
    assert router.METRIC_INFLIGHT in parse(text, 0.0).samples


async def test_the_client_drains_and_undrains(fleet: Fleet) -> None:
    workers, port = WorkerClient(), port_of(fleet.workers["d"])
    body = {"move_streams": False}
    assert await workers.admin("127.0.0.1", port, worker.ACTION_DRAIN, TOKEN, body)
    drained = await workers.state("127.0.0.1", port)
    assert await workers.admin("127.0.0.1", port, worker.ACTION_UNDRAIN, TOKEN, {})
    undrained = await workers.state("127.0.0.1", port)
    refused = await workers.admin("127.0.0.1", port, worker.ACTION_DRAIN, "other", body)
    await workers.close()
    assert drained is not None
    assert drained.draining
    assert undrained is not None
    assert not undrained.draining
    assert not refused


async def test_the_client_changes_a_role_back(fleet: Fleet) -> None:
    workers, port = WorkerClient(), port_of(fleet.workers["d"])
    roles = []
    for role in ("both", str(Role.DECODE)):
        assert await workers.admin("127.0.0.1", port, worker.ACTION_ROLE, TOKEN, {"role": role})
        state = await workers.state("127.0.0.1", port)
        roles.append(state.role if state is not None else "")
    await workers.close()
    assert roles == ["both", str(Role.DECODE)]


async def test_the_client_probes(fleet: Fleet) -> None:
    said = fleet.processes[0].said("listening")
    assert said is not None
    body = {"host": "127.0.0.1", "port": said["bootstrap"], "num_blocks": 4}
    workers, port = WorkerClient(), port_of(fleet.workers["d"])
    answer = await workers.probe("127.0.0.1", port, TOKEN, body)
    await workers.close()
    assert answer.error == ""
    assert answer.transport
    assert answer.num_bytes > 0


def test_the_label_of_test_workers_is_the_one_that_workers_name() -> None:
    assert faults.LABEL == labels.LABEL_FAULTS
    assert (faults.VARIABLE, faults.PERMIT) == (pods.ENV_FAULTS, pods.ENV_FAULTS_ALLOWED)
