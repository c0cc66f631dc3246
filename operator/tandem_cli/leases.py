"""`tandem debug leases`: what workers hold, and for whom, as they say themselves."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import httpx
import typer
from rich.table import Table

from tandem_cli.console import results
from tandem_cli.errors import CliError
from tandem_cli.target import find_target
from tandem_cli.workers import call_admin, find_workers, last_line

PATH: Final = "/admin/leases"
SECONDS: Final = 10.0


def show_leases(
    cluster: str,
    kubeconfig: Path | None,
    service: str,
    namespace: str,
    url: str,
    token_file: Path | None,
    output: str,
) -> None:
    """Print what one worker (`url`), or every worker of a service, holds."""
    if bool(url) == bool(service):
        raise CliError(
            "name either a service or one worker's --url", "for example: tandem debug leases chat"
        )
    if url and token_file is None:
        raise CliError("--url needs the worker's admin token", "give its file with --token-file")
    if url and token_file is not None:
        found = {url: ask_worker(url, token_file)}
    else:
        found = ask_service(cluster, kubeconfig, service, namespace)
    if output == "json":
        typer.echo(json.dumps(found, indent=2))
        return
    for name, held in found.items():
        results.print(describe(name, held), soft_wrap=True)
        if held.get("requests") or held.get("fetches") or held.get("pushes"):
            results.print(build_table(held))


def ask_worker(url: str, token_file: Path) -> dict[str, Any]:
    """What the worker at `url` holds. Raises CliError."""
    try:
        token = token_file.read_text().strip()
        headers = {"Authorization": f"Bearer {token}"}
        reply = httpx.get(url.rstrip("/") + PATH, headers=headers, timeout=SECONDS)
        reply.raise_for_status()
        answer: dict[str, Any] = reply.json()
    except (OSError, httpx.HTTPError, ValueError) as error:
        raise CliError(
            f"{url} can't be asked: {error}", "give its HTTP port (8100), and the token's file"
        ) from None
    return answer


def ask_service(
    cluster: str, kubeconfig: Path | None, service: str, namespace: str
) -> dict[str, dict[str, Any]]:
    """What every worker of a service holds, by pod; `error` where one couldn't be asked."""
    target = find_target(cluster, kubeconfig)
    found = {}
    for pod in find_workers(target, service, namespace):
        done = call_admin(target, namespace, pod, PATH)
        found[pod.name] = read_answer(done.stdout, last_line(done))
    return found


def read_answer(text: str, error: str) -> dict[str, Any]:
    """What /admin/leases answered, or `error` alone."""
    try:
        answer: dict[str, Any] = json.loads(text)
        return answer if "blocks" in answer else {"error": str(answer["error"]["message"])}
    except (ValueError, KeyError, TypeError):
        return {"error": error}


def describe(name: str, held: Mapping[str, Any]) -> str:
    """One line about a worker: its blocks by use."""
    if "error" in held:
        return f"[bold]{name}[/]: [red]can't be asked[/]: {held['error']}"
    blocks = ", ".join(f"{count} {use}" for use, count in held["blocks"].items())
    return f"[bold]{name}[/] ({held['role']}): {blocks}"


def build_table(held: Mapping[str, Any]) -> Table:
    """Requests, then the hand-off's part of them: fetches as D, pushes as P."""
    table = Table("WHAT", "REQUEST", "STATE", "EPOCH", "WITH", "OVER", "HOLDS", "TIME", box=None)
    for request in held["requests"]:
        pinned = ", pinned" if request["leased"] else ""
        table.add_row(
            *(f"{request['kind']} request", request["rid"], request["state"], "", "", ""),
            f"{request['num_blocks']} blocks{pinned}",
            "",
        )
    for fetch in held["fetches"]:
        table.add_row(
            *("fetch", fetch["rid"] or "probe", fetch["state"], str(fetch["epoch"])),
            *(fetch["worker_id"], fetch["transport"]),
            f"{len(fetch['blocks'])} blocks, {fetch['num_bytes']} bytes came",
            f"idle for {fetch['idle_seconds']:.1f} s",
        )
    for push in held["pushes"]:
        table.add_row(
            *("push", push["rid"], push["state"], str(push["epoch"])),
            *(push["worker_id"], push["transport"]),
            f"{push['num_bytes']} bytes went",
            f"lease ends in {push['lease_seconds']:.1f} s",
        )
    return table
