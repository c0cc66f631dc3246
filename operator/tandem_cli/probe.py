"""`tandem probe`: moves checksummed KV between workers of a service and shows how it went."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.markup import escape
from rich.table import Table

from tandem_cli.console import results
from tandem_cli.errors import CliError
from tandem_cli.target import find_target
from tandem_cli.workers import call_admin, find_workers, last_line
from tandem_operator.facts.worker import WorkerPod
from tandem_operator.names.worker import ACTION_PROBE, ROUTE_ADMIN
from tandem_operator.pair import Role

if TYPE_CHECKING:
    from tandem_local import Cluster

Link = tuple[WorkerPod, WorkerPod]
"""Who sends, and who receives."""


def probe_service(
    cluster: str,
    kubeconfig: Path | None,
    service: str,
    sender: str,
    receiver: str,
    namespace: str,
    num_blocks: int,
    output: str,
) -> None:
    """Probe one pair, or one of each pair of nodes. Ends with code 1 if KV did not move."""
    target = find_target(cluster, kubeconfig)
    workers = find_workers(target, service, namespace)
    pairs = choose_pairs(workers, sender, receiver)
    found = [_probe(target, namespace, pair, num_blocks) for pair in pairs]
    if output == "json":
        typer.echo(json.dumps(found, indent=2))
    else:
        _show(found)
    if not all(answer["ok"] for answer in found):
        raise typer.Exit(1)


def choose_pairs(workers: list[WorkerPod], sender: str, receiver: str) -> list[Link]:
    """The pairs to probe: the named workers, or one prefill and one decode worker per node.

    Named ones may be of any role, since every worker can send and receive. Raises CliError.
    """
    known = {pod.name: pod for pod in workers}
    for name in filter(None, (sender, receiver)):
        if name not in known:
            raise CliError(f"there is no running worker {name!r}", f"use one of {', '.join(known)}")
    if sender and sender == receiver:
        raise CliError(f"{sender!r} can't send to itself", "name two workers")
    senders = [known[sender]] if sender else [pod for pod in workers if pod.role is Role.PREFILL]
    receivers = [known[receiver]] if receiver else [p for p in workers if p.role is Role.DECODE]
    chosen: dict[tuple[str, str], Link] = {}
    for one in senders:
        for other in receivers:
            if one is not other:
                chosen.setdefault((one.node, other.node), (one, other))
    if not chosen:
        raise CliError(
            "there is no prefill worker beside a decode worker",
            f"name two workers, FROM TO, of {', '.join(known)}",
        )
    return list(chosen.values())


def _probe(target: "Cluster", namespace: str, pair: Link, num_blocks: int) -> dict[str, Any]:
    sender, receiver = pair
    body = {"host": sender.ip, "port": sender.ports.bootstrap, "num_blocks": num_blocks}
    path = f"{ROUTE_ADMIN}/{ACTION_PROBE}"
    done = call_admin(target, namespace, receiver, path, json.dumps(body))
    named = {
        "from": sender.name,
        "fromNode": sender.node,
        "to": receiver.name,
        "toNode": receiver.node,
    }
    return named | read_answer(done.stdout, last_line(done))


def read_answer(text: str, error: str) -> dict[str, Any]:
    """What /admin/probe answered; with `ok` and `error` whatever came."""
    try:
        answer: dict[str, Any] = json.loads(text)
        if "ok" in answer:
            return answer
        return {"ok": False, "error": str(answer["error"]["message"])}
    except (ValueError, KeyError, TypeError):
        return {"ok": False, "error": error}


def _show(found: list[dict[str, Any]]) -> None:
    table = Table(
        "FROM", "TO", "TRANSPORT", "MB/S", "1 BLOCK", "MOVED", "SENDING", "LANDING", box=None
    )
    for answer in found:
        table.add_row(
            f"{answer['from']} ({answer['fromNode']})",
            f"{answer['to']} ({answer['toNode']})",
            answer.get("transport") or "-",
            f"{answer.get('megabytesPerSecond', 0):.0f}",
            _milliseconds(answer.get("latencySeconds")),
            f"{answer.get('bytes', 0) / 1e6:.3g} MB in {_milliseconds(answer.get('seconds'))}",
            _milliseconds(answer.get("sendSeconds")),
            _milliseconds(answer.get("landSeconds")),
        )
    results.print(table)
    for answer in found:
        name = f"{answer['from']} to {answer['to']}"
        if not answer["ok"]:
            results.print(f"  [red]{name}: {escape(answer['error'])}[/]", soft_wrap=True)
        for why in answer.get("slow", []):
            results.print(f"  {name}: {escape(why)}", soft_wrap=True)


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.2f} ms"
