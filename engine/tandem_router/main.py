"""`tandem-router`: flags, logging, the HTTP server, and a clean end on SIGTERM."""

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import Final, get_args

import msgspec
import structlog

from tandem_router.api.cors import parse_origins
from tandem_router.api.keys import read_api_keys
from tandem_router.app import build_app, build_metrics_app
from tandem_router.config import PolicyName, RouterConfig, SloClass
from tandem_router.discovery.source import parse_address
from tandem_router.errors import ModelLoadError, PortError
from tandem_router.http_server import HttpServer, open_listener
from tandem_router.router import default_router_id, running_router
from tandem_router.text.loading import load_text_model
from tandem_router.text.model import TextModel

log = structlog.get_logger(__name__)

_DAY = 86400
_RANGES: Final = {
    "port": (0, 65535),
    "drain_seconds": (0, 7 * _DAY),
    "linger_seconds": (0, _DAY),
    "queue_seconds": (0, _DAY),
    "failover_seconds": (0, _DAY),
    "max_inflight": (1, 1 << 20),
}


class SloClassJson(msgspec.Struct, rename="camel", forbid_unknown_fields=True):
    """One entry of --slo-classes: one of spec.slo.classes, without its percentile."""

    name: str
    default: bool = False
    ttft_milliseconds: int = 0
    tbt_milliseconds: int = 0
    priority: int = 0


def parse_slo_classes(text: str) -> tuple[SloClass, ...]:
    """The JSON list of --slo-classes. Raises ValueError."""
    try:
        entries = msgspec.json.decode(text or "[]", type=list[SloClassJson])
    except msgspec.MsgspecError as error:
        raise ValueError(f"--slo-classes: {error}") from error
    if sum(entry.default for entry in entries) > 1:
        raise ValueError("--slo-classes: more than one class is marked default: mark one")
    return tuple(
        SloClass(
            name=entry.name,
            default=entry.default,
            ttft_seconds=entry.ttft_milliseconds / 1e3,
            tbt_seconds=entry.tbt_milliseconds / 1e3,
            priority=entry.priority,
        )
        for entry in entries
    )


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="tandem-router", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--model-name", default="", help="name that requests give (default: the URI's last part)")
    add("--model", required=True, help="model URI, for tokenizer and chat template")
    add("--revision", default="", help="revision; with --service only its workers are used")
    add("--model-id", default="", help="with --service only workers annotated with this are used")
    add("--host", default="0.0.0.0", help="address to listen on")
    add("--port", type=int, default=8000, help="port for clients; 0 takes a free one")
    add(
        "--metrics-port",
        type=int,
        default=0,
        help="port of /metrics and /state, which are not for clients; 0 takes a free one",
    )
    add("--service", default="", help="watch pods labelled tandem.dev/service=NAME")
    add("--namespace", default="", help="namespace of those pods (default: the router's own)")
    add("--worker", action="append", default=[], metavar="HOST:PORT", help="a fixed worker")
    add("--policy", choices=get_args(PolicyName), default="LeastLoaded")
    add("--slo-classes", default="", help="JSON list as in spec.slo.classes, without percentile")
    add("--api-keys-file", default="", help="file with one API key a line, or a folder of such")
    add(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="let pages of https://HOST[:PORT], or of all origins (*), call from a browser",
    )
    add("--drain-seconds", type=float, default=600.0, help="how long SIGTERM lets streams finish")
    add(
        "--linger-seconds",
        type=float,
        default=None,
        help="how long requests are still taken after SIGTERM has turned /ready off "
        "(default: 3 with --service, else 0)",
    )
    add("--queue-seconds", type=float, default=20.0, help="how long a request waits for a worker")
    add("--failover-seconds", type=float, default=120.0, help="how long a started one waits")
    add("--max-inflight", type=int, default=8192, help="sequences at a time; more get 429")
    add("--cache-dir", default="", help="where converted tokenizers are kept")
    add("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    add("--no-access-log", action="store_true", help="log no line per request")
    return parser


def _check_ranges(arguments: argparse.Namespace) -> None:
    for name, (low, high) in _RANGES.items():
        value = getattr(arguments, name)
        # Not a number is in no range.
        if value is not None and not low <= value <= high:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} is {value:g}: give {low} to {high}")


def parse_config(arguments: argparse.Namespace) -> RouterConfig:
    """Flags to configuration. Raises ValueError or OSError, naming the flag."""
    _check_ranges(arguments)
    if bool(arguments.service) == bool(arguments.worker):
        raise ValueError("give either --service or one or more --worker, not both")
    if arguments.namespace and not arguments.service:
        raise ValueError("--namespace is of the pods that --service finds: leave it out")
    for worker in arguments.worker:
        parse_address(worker)
    read_api_keys(arguments.api_keys_file)
    return RouterConfig(
        model_name=arguments.model_name or arguments.model.rstrip("/").rsplit("/", 1)[-1],
        model=arguments.model,
        revision=arguments.revision,
        model_id=arguments.model_id,
        host=arguments.host,
        port=arguments.port,
        metrics_port=arguments.metrics_port,
        service=arguments.service,
        namespace=arguments.namespace,
        workers=tuple(arguments.worker),
        policy=arguments.policy,
        slo_classes=parse_slo_classes(arguments.slo_classes),
        api_keys_file=arguments.api_keys_file,
        cors_origins=parse_origins(arguments.cors_origin),
        drain_seconds=arguments.drain_seconds,
        linger_seconds=_linger(arguments),
        queue_seconds=arguments.queue_seconds,
        failover_seconds=arguments.failover_seconds,
        max_inflight=arguments.max_inflight,
        cache_dir=arguments.cache_dir,
        router_id=default_router_id(),
    )


def _linger(arguments: argparse.Namespace) -> float:
    """A Service's endpoints take a moment to change; a static router has no Service."""
    if arguments.linger_seconds is not None:
        return float(arguments.linger_seconds)
    return 3.0 if arguments.service else 0.0


def configure_logging(level: str, access_log: bool) -> None:
    """One JSON line per event on standard output."""
    number = logging.getLevelNamesMapping()[level.upper()]
    structlog.configure(
        processors=[
            structlog.stdlib.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(serializer=_to_json),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=_LoggerFactory(access_log),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(level=max(number, logging.WARNING), format="%(levelname)s %(message)s")


def _to_json(value: object, **_: object) -> str:
    return msgspec.json.encode(value, enc_hook=repr).decode()


class _LoggerFactory:
    """Prints; the access log can be silenced on its own."""

    def __init__(self, access_log: bool) -> None:
        self._access_log = access_log

    def __call__(self, *names: str) -> object:
        if names[:1] == ("access",) and not self._access_log:
            return structlog.ReturnLogger()
        return structlog.PrintLogger()


async def serve(config: RouterConfig, text: TextModel) -> None:
    """Run until SIGTERM or SIGINT, then drain. A second signal ends at once."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with running_router(config, text) as context:
        listeners = {
            "port": open_listener(config.host, config.port, "--port"),
            "metrics_port": open_listener(config.host, config.metrics_port, "--metrics-port"),
        }
        apps = (build_app(context), build_metrics_app(context))
        servers = [HttpServer(app, config) for app in apps]
        serving = [
            asyncio.create_task(server.serve(sockets=[listener]))
            for server, listener in zip(servers, listeners.values(), strict=True)
        ]
        ports = {name: listener.getsockname()[1] for name, listener in listeners.items()}
        log.info("serving", host=config.host, **ports, model=config.model_name)
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({*serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stop.clear()
        context.dispatcher.leaving = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(config.linger_seconds):
                await stop.wait()
        log.info("draining", inflight=context.dispatcher.num_inflight)
        drained = asyncio.create_task(context.dispatcher.drain(config.drain_seconds))
        again = asyncio.create_task(stop.wait())
        await asyncio.wait({drained, again}, return_when=asyncio.FIRST_COMPLETED)
        for task in (drained, again, stopping):
            task.cancel()
        for server in servers:
            server.should_exit = True
        await asyncio.gather(*serving)
        log.info("stopped")


def main(argv: Sequence[str] | None = None) -> None:
    """The console script."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    try:
        config = parse_config(arguments)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    configure_logging(arguments.log_level, not arguments.no_access_log)
    try:
        text = load_text_model(config.model, revision=config.revision, cache_dir=config.cache_dir)
    except ModelLoadError as error:
        print(f"tandem-router: {error}", file=sys.stderr)
        sys.exit(1)
    import uvloop

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        uvloop.run(serve(config, text))
    except PortError as error:
        print(f"tandem-router: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
