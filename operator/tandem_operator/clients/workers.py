"""The one HTTP client for workers and routers: `/state`, `/metrics` and `/admin/*`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import httpx
import structlog

from tandem_operator.facts.worker import Links, LinkTrouble, WorkerFigures, WorkerState
from tandem_operator.names import worker
from tandem_operator.names.router import ROUTE_METRICS

STATE_SECONDS: Final = 3.0
SCRAPE_SECONDS: Final = 2.0
CALL_SECONDS: Final = 10.0
PROBE_SECONDS: Final = 30.0

log = structlog.get_logger("tandem.workers")


@dataclass(frozen=True)
class ProbeAnswer:
    """What a worker reports after it fetched KV from another one. `error` is empty on success.

    `passed_over` are the better transports that the two could not use, each with its reason.
    """

    transport: str = ""
    num_bytes: int = 0
    seconds: float = 0.0
    error: str = ""
    passed_over: str = ""
    latency_seconds: float = 0.0


class WorkerClient:
    """Calls workers and routers by their pod's IP and http port; close it at the end.

    A pod that doesn't answer is not an error: the methods return None, False or an answer with the
    error.
    """

    def __init__(self, transport: httpx.AsyncBaseTransport | None = None) -> None:
        # They are pods: never by way of a proxy that the environment names.
        self._client = httpx.AsyncClient(trust_env=False, transport=transport)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def state(self, ip: str, port: int, seconds: float = STATE_SECONDS) -> WorkerState | None:
        """The worker's state, or None when it doesn't answer within `seconds`."""
        url = _url(ip, port, worker.ROUTE_STATE)
        try:
            response = await self._client.get(url, timeout=seconds)
            response.raise_for_status()
            return read_state(response.json())
        except (httpx.HTTPError, ValueError, TypeError, KeyError) as error:
            log.info("worker does not report its state", ip=ip, error=repr(error))
            return None

    async def metrics(self, ip: str, port: int) -> str | None:
        """A router's metrics as Prometheus text, or None when it doesn't answer."""
        url = _url(ip, port, ROUTE_METRICS)
        try:
            response = await self._client.get(url, timeout=SCRAPE_SECONDS)
            response.raise_for_status()
            return response.text
        except httpx.HTTPError as error:
            log.info("router does not report its metrics", ip=ip, error=repr(error))
            return None

    async def admin(
        self, ip: str, port: int, action: str, token: str, body: Mapping[str, Any]
    ) -> bool:
        """Make a worker drain, undrain or take a role. Returns whether it did."""
        try:
            response = await self._post(ip, port, action, token, body, CALL_SECONDS)
            response.raise_for_status()
        except httpx.HTTPError as error:
            log.warning("worker call failed", action=action, ip=ip, error=repr(error))
            return False
        return True

    async def probe(self, ip: str, port: int, token: str, body: Mapping[str, Any]) -> ProbeAnswer:
        """Make one worker fetch KV from another. A failure is an answer too."""
        try:
            response = await self._post(ip, port, worker.ACTION_PROBE, token, body, PROBE_SECONDS)
            answer = _object(response)
            error = str(answer.get("error") or "")
            if response.is_error and not error:
                error = f"HTTP {response.status_code}: {response.text[:300]}"
            return ProbeAnswer(
                transport=str(answer.get("transport") or ""),
                passed_over=_list(answer.get("passedOver")),
                num_bytes=int(answer.get("bytes") or 0),
                seconds=float(answer.get("seconds") or 0.0),
                error=error,
                latency_seconds=float(answer.get("latencySeconds") or 0.0),
            )
        except (httpx.HTTPError, ValueError, TypeError) as failure:
            return ProbeAnswer(error=repr(failure))

    async def _post(
        self, ip: str, port: int, action: str, token: str, body: Mapping[str, Any], seconds: float
    ) -> httpx.Response:
        return await self._client.post(
            _url(ip, port, f"{worker.ROUTE_ADMIN}/{action}"),
            json=dict(body),
            headers={"Authorization": f"Bearer {token}"},
            timeout=seconds,
        )


def read_state(answer: Any) -> WorkerState:
    """The state in an answer of `/state`.

    Raises ValueError, TypeError or KeyError when it isn't one.
    """
    if not isinstance(answer, Mapping):
        raise ValueError(f"/state is a {type(answer).__name__}, not an object")
    load = answer.get(worker.STATE_LOAD) or {}
    if not isinstance(load, Mapping):
        raise ValueError(f"/state has a {type(load).__name__} as {worker.STATE_LOAD}")
    streams = int(load.get(worker.LOAD_RUNNING, 0)) + int(load.get(worker.LOAD_WAITING, 0))
    return WorkerState(
        # The server counts requests until their last token is sent, the core until it is computed.
        num_running=max(streams, len(answer.get(worker.STATE_RUNNING) or ())),
        num_leases=int(answer.get(worker.STATE_LEASES) or 0),
        draining=bool(answer.get(worker.STATE_DRAINING, False)),
        role=str(answer.get(worker.STATE_ROLE) or ""),
        figures=_figures(load, answer.get(worker.STATE_COUNTERS)),
        links=_links(answer),
    )


def _links(answer: Mapping[str, Any]) -> Links:
    """What a worker says of those that send KV to it. A worker of an older release says less."""
    pairings = answer.get(worker.STATE_PAIRINGS) or ()
    troubles = answer.get(worker.STATE_TROUBLES) or ()
    return Links(
        {
            str(each["worker_id"]): str(each["transport"])
            for each in pairings
            if isinstance(each, Mapping) and each.get("side") == "decode"
        },
        tuple(
            LinkTrouble(
                peer=str(each["worker_id"]),
                num_faults=int(each["num_faults"]),
                out_of_use=bool(each["out_of_use"]),
                reason=str(each["reason"]),
            )
            for each in troubles
            if isinstance(each, Mapping)
        ),
    )


def _figures(load: Mapping[str, Any], counters: Any) -> WorkerFigures | None:
    try:
        return WorkerFigures(
            **{name: float(load[name]) for name in worker.LOAD_FIELDS},
            num_prefilled=float(counters.get(worker.COUNTER_PREFILLED, 0.0)),
        )
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _url(ip: str, port: int, path: str) -> str:
    host = f"[{ip}]" if ":" in ip else ip
    return f"http://{host}:{port}{path}"


def _object(response: httpx.Response) -> Mapping[str, Any]:
    if "json" not in response.headers.get("content-type", ""):
        return {}
    answer = response.json()
    return answer if isinstance(answer, Mapping) else {}


def _list(reasons: object) -> str:
    """What a worker says of each transport, in one line; empty of a worker that says nothing."""
    if not isinstance(reasons, Mapping):
        return ""
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
