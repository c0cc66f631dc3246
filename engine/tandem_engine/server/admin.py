"""Serves a worker's HTTP: health, readiness, metrics, state, and the operator's calls."""

import asyncio
import hashlib
import hmac
import itertools
import os
from collections.abc import Awaitable, Callable, Mapping
from typing import Final, TypeVar, get_args

import msgspec
import structlog
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tandem_engine.config import read_admin_token
from tandem_engine.errors import ConfigError
from tandem_engine.frames import (
    LeaseQuery,
    LeaseReport,
    ProbeRequest,
    ProbeResult,
    SetMode,
    ToCore,
)
from tandem_engine.server.api import (
    DrainBody,
    EmptyBody,
    HealthAnswer,
    LeasesAnswer,
    LoadingState,
    Path,
    ProbeAnswer,
    ProbeBody,
    ReadyAnswer,
    RoleBody,
    StateAnswer,
)
from tandem_engine.server.metrics import WorkerMetrics
from tandem_engine.server.routers import RouterHub
from tandem_engine.server.status import WorkerStatus
from tandem_wire.messages import Role

B = TypeVar("B")
Handler = Callable[[Request], Awaitable[Response]]

log = structlog.get_logger()

MODE_SECONDS: Final = 5.0
PROBE_SECONDS: Final = 60.0


class AdminApp:
    """The ASGI application in `app`."""

    def __init__(
        self,
        status: WorkerStatus,
        hub: RouterHub,
        metrics: WorkerMetrics,
        to_core: Callable[[ToCore], None],
    ) -> None:
        self._status = status
        self._hub = hub
        self._metrics = metrics
        self._to_core = to_core
        self._token_file = status.config.admin_token_file
        self._numbers = itertools.count(1)
        self._asked: dict[int, asyncio.Future[ProbeResult | LeaseReport]] = {}
        self.app = Starlette(
            routes=[
                Route(Path.HEALTH, self._health),
                Route(Path.READY, self._ready),
                Route(Path.METRICS, self._render_metrics),
                Route(Path.STATE, self._show_state),
                Route(Path.DRAIN, self._admin(self._drain), methods=["POST"]),
                Route(Path.UNDRAIN, self._admin(self._undrain), methods=["POST"]),
                Route(Path.ROLE, self._admin(self._change_role), methods=["POST"]),
                Route(Path.PROBE, self._admin(self._probe), methods=["POST"]),
                Route(Path.LEASES, self._admin(self._list_leases)),
            ],
            exception_handlers={HTTPException: _error_response},
        )

    def answer(self, result: ProbeResult | LeaseReport) -> None:
        """The core has an answer; no one is waiting for a late one."""
        future = self._asked.get(result.number)
        if future is not None and not future.done():
            future.set_result(result)

    def _admin(self, handler: Handler) -> Handler:
        async def guarded(request: Request) -> Response:
            self._authenticate(request)
            if self._status.ready is None:
                raise HTTPException(503, self._status.not_ready())
            return await handler(request)

        return guarded

    def _authenticate(self, request: Request) -> None:
        """Read the token anew, because a mounted file may change; without one nobody may pass."""
        if not self._token_file:
            raise HTTPException(
                403, "this worker was started without a token for /admin; use --admin-token-file"
            )
        try:
            token = read_admin_token(self._token_file)
        except ConfigError as error:
            log.error("nobody can call /admin", reason=str(error))
            raise HTTPException(503, "the admin token can't be read; see the log") from None
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # As the bytes that were sent: starlette reads headers as Latin-1.
        sent = given.strip().encode("latin-1")
        # Of digests, so that not even the token's length shows in the time.
        same = hmac.compare_digest(hashlib.sha256(sent).digest(), hashlib.sha256(token).digest())
        if scheme.lower() != "bearer" or not same:
            raise HTTPException(
                401, "the admin token is missing or wrong; send Authorization: Bearer TOKEN"
            )

    # --- anyone -----------------------------------------------------------------------------------

    async def _health(self, _: Request) -> Response:
        if self._status.error:
            raise HTTPException(503, self._status.error)
        return _json(HealthAnswer())

    async def _ready(self, _: Request) -> Response:
        reason = self._status.not_ready()
        return _json(ReadyAnswer(not reason, reason), 503 if reason else 200)

    async def _render_metrics(self, _: Request) -> Response:
        return Response(
            self._metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    async def _show_state(self, _: Request) -> Response:
        return _json(self._describe())

    def _describe(self) -> StateAnswer:
        status = self._status
        config, stats, reason = status.config, status.stats, status.not_ready()
        startup = status.ready.startup if status.ready else None
        return StateAnswer(
            worker_id=config.worker_id,
            boot_id=config.boot_id,
            model=config.model,
            served_model_name=config.served_model_name,
            revision=config.revision,
            compatibility_hash=status.ready.compatibility_hash if status.ready else "",
            role=status.state.role,
            draining=status.state.draining,
            ready=not reason,
            reason=reason,
            loading=LoadingState(status.loading.stage, status.loading.fraction),
            startup=startup.as_json() if startup else None,
            reports=status.num_reports,
            leases=status.state.num_leases,
            load=status.state,
            ledger=stats.ledger if stats else {},
            counters=stats.counters if stats else {},
            gauges=stats.gauges if stats else {},
            faults=config.faults,
            pairings=stats.pairings if stats else [],
            troubles=stats.troubles if stats else [],
            checks=[check.as_json() for check in status.checks],
            running=self._hub.running,
            routers=self._hub.router_ids,
            pid=os.getpid(),
            core_pid=status.core_pid,
            ports=status.ports,
            fabric=status.fabric.as_json(),
        )

    # --- the operator -----------------------------------------------------------------------------

    async def _drain(self, request: Request) -> Response:
        body = await _read(request, DrainBody)
        return await self._set_mode(
            SetMode(draining=True, move_streams=body.move_streams),
            lambda: self._status.state.draining,
        )

    async def _undrain(self, request: Request) -> Response:
        await _read(request, EmptyBody)
        if self._status.stopping:
            raise HTTPException(409, "the worker is shutting down; its drain can't be undone")
        return await self._set_mode(
            SetMode(draining=False), lambda: not self._status.state.draining
        )

    async def _change_role(self, request: Request) -> Response:
        body = await _read(request, RoleBody)
        return await self._set_mode(
            SetMode(role=body.role), lambda: self._status.state.role == body.role
        )

    async def _set_mode(self, mode: SetMode, done: Callable[[], bool]) -> Response:
        self._to_core(mode)
        if not await self._status.wait_for(done, MODE_SECONDS):
            raise HTTPException(
                503, f"the core did not follow within {MODE_SECONDS:g} s; try again after its step"
            )
        return _json(self._describe())

    async def _probe(self, request: Request) -> Response:
        body = await _read(request, ProbeBody)
        number = next(self._numbers)
        result = await self._ask_core(
            ProbeRequest(number=number, host=body.host, port=body.port, num_blocks=body.num_blocks),
            PROBE_SECONDS,
            "see the logs of both workers",
        )
        assert isinstance(result, ProbeResult)
        return _json(ProbeAnswer.of(result), 200 if not result.error else 502)

    async def _list_leases(self, _: Request) -> Response:
        report = await self._ask_core(
            LeaseQuery(next(self._numbers)), MODE_SECONDS, "try again after its step"
        )
        assert isinstance(report, LeaseReport)
        config = self._status.config
        return _json(
            LeasesAnswer(
                worker_id=config.worker_id,
                boot_id=config.boot_id,
                role=self._status.state.role,
                blocks=report.blocks,
                requests=report.requests,
                fetches=report.fetches,
                pushes=report.pushes,
            )
        )

    async def _ask_core(
        self, question: ProbeRequest | LeaseQuery, seconds: float, remedy: str
    ) -> ProbeResult | LeaseReport:
        """The core's answer to a question, by its number; 504 when none comes in time."""
        future: asyncio.Future[ProbeResult | LeaseReport]
        future = asyncio.get_running_loop().create_future()
        self._asked[question.number] = future
        self._to_core(question)
        try:
            async with asyncio.timeout(seconds):
                return await future
        except TimeoutError:
            raise HTTPException(504, f"no result within {seconds:g} s; {remedy}") from None
        finally:
            del self._asked[question.number]


def _json(answer: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    content = msgspec.json.encode(answer)
    return Response(content, status, headers, media_type="application/json")


async def _read(request: Request, kind: type[B]) -> B:
    """The JSON body as `kind` (an empty one counts as `{}`), or 400."""
    body = await request.body() or b"{}"
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.MsgspecError as error:
        allowed = f"; role is one of {', '.join(get_args(Role))}" if kind is RoleBody else ""
        raise HTTPException(400, f"{error}{allowed}") from None


_ERROR_TYPES: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
}


async def _error_response(request: Request, error: Exception) -> Response:
    """Errors in the shape that OpenAI clients know."""
    assert isinstance(error, HTTPException)
    kind = _ERROR_TYPES.get(
        error.status_code, "invalid_request_error" if error.status_code < 500 else "server_error"
    )
    message = error.detail
    if error.status_code == 404:
        message = f"there is nothing at {request.url.path}"
    body = {"message": message, "type": kind, "param": None, "code": str(error.status_code)}
    headers = {"WWW-Authenticate": "Bearer"} if error.status_code == 401 else None
    return _json({"error": body}, error.status_code, headers)
