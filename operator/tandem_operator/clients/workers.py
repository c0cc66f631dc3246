"""The workers' HTTP: what they say at `/state`, and the calls to `/admin/*`."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final

import httpx
import structlog

from tandem_operator.facts.observed import ProbeResult, WorkerLoad
from tandem_operator.names.pods import PORT_WORKER_HTTP
from tandem_operator.plan.steps import EngineCall

STATE_SECONDS: Final = 3.0
CALL_SECONDS: Final = 10.0
PROBE_SECONDS: Final = 30.0

log = structlog.get_logger("tandem.worker_api")


class WorkerApi:
    """One HTTP client for all workers; close it at the end. A worker that is silent is no error."""

    def __init__(self, port: int = PORT_WORKER_HTTP) -> None:
        # Workers are pods: never by way of a proxy that the environment names.
        self._client = httpx.AsyncClient(trust_env=False)
        self._port = port

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def load(self, ip: str) -> WorkerLoad | None:
        """The worker's load, or None when it doesn't answer."""
        try:
            response = await self._client.get(self._url(ip, "/state"), timeout=STATE_SECONDS)
            response.raise_for_status()
            return read_load(response.json())
        except (httpx.HTTPError, ValueError, TypeError) as error:
            log.info("worker does not tell its state", ip=ip, error=repr(error))
            return None

    async def call(self, call: EngineCall) -> bool:
        """Drain or undrain. Returns whether the worker did it."""
        try:
            response = await self._post(call, CALL_SECONDS)
            response.raise_for_status()
        except httpx.HTTPError as error:
            log.warning("worker call failed", action=call.action, pod=call.pod, error=repr(error))
            return False
        return True

    async def probe(self, call: EngineCall, now: datetime) -> ProbeResult:
        """Let one worker fetch KV from another. A failure is a result."""
        transport, num_bytes, seconds, error = "", 0, 0.0, ""
        try:
            response = await self._post(call, PROBE_SECONDS)
            answer = _object(response)
            transport = str(answer.get("transport") or "")
            num_bytes = int(answer.get("bytes") or 0)
            seconds = float(answer.get("seconds") or 0.0)
            error = str(answer.get("error") or "")
            if response.is_error and not error:
                error = f"HTTP {response.status_code}: {response.text[:300]}"
        except (httpx.HTTPError, ValueError, TypeError) as failure:
            error = repr(failure)
        return ProbeResult(
            call.revision, call.pod, call.peer, now, transport, num_bytes, seconds, error
        )

    async def _post(self, call: EngineCall, seconds: float) -> httpx.Response:
        return await self._client.post(
            self._url(call.ip, f"/admin/{call.action}"),
            json=dict(call.body),
            headers={"Authorization": f"Bearer {call.token}"},
            timeout=seconds,
        )

    def _url(self, ip: str, path: str) -> str:
        host = f"[{ip}]" if ":" in ip else ip
        return f"http://{host}:{self._port}{path}"


def read_load(state: Any) -> WorkerLoad:
    """The load in an answer of `/state`. Raises ValueError when it isn't one."""
    if not isinstance(state, Mapping):
        raise ValueError("the state is no object")
    load = state.get("load") or {}
    streams = int(load.get("num_running", 0)) + int(load.get("num_waiting", 0))
    return WorkerLoad(
        # The server counts requests until their last token is sent, the core until it is computed.
        num_running=max(streams, len(state.get("running") or ())),
        num_leases=int(state.get("leases") or 0),
        draining=bool(state.get("draining", False)),
        role=str(state.get("role") or ""),
    )


def _object(response: httpx.Response) -> Mapping[str, Any]:
    if "json" not in response.headers.get("content-type", ""):
        return {}
    answer = response.json()
    return answer if isinstance(answer, Mapping) else {}
