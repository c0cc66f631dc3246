"""A prefill and a decode worker as processes: equal tokens, whatever happens to the first."""

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from tandem_engine.server.tests.processes import RouterClient, WorkerProcess, prompt, until

SLOW = "tiny?prefill_per_token=0.003"  # a chunk of 64 tokens takes 0.2 s
LONG = 600  # tokens: about two seconds on a slow worker
ENDLESS = 10 * LONG  # for prompts that are not to end before the test has acted


@pytest.fixture(name="stack")
async def stack_fixture() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


async def start(
    stack: AsyncExitStack, *names: str, flags: tuple[str, ...] = (), shm_dir: str = ""
) -> list[WorkerProcess]:
    """Start workers side by side; names that begin with `slow` prefill slowly."""

    async def one(name: str) -> WorkerProcess:
        mock = SLOW if name.startswith("slow") else "tiny"
        worker = await WorkerProcess.start(name, *flags, mock=mock, TANDEM_SHM_DIR=shm_dir)
        stack.push_async_callback(worker.stop)
        return worker

    return list(await asyncio.gather(*(one(name) for name in names)))


async def connect(stack: AsyncExitStack, worker: WorkerProcess) -> RouterClient:
    client = await RouterClient.connect(worker)
    stack.push_async_callback(client.close)
    return client


async def prefilling(worker: WorkerProcess) -> None:
    """Wait until the worker computes a prompt for another one and has pushed some of it."""

    async def pushing() -> bool:
        return bool((await worker.state())["leases"])

    await until(pushing, f"{worker.name} to hold a lease")


async def reference(client: RouterClient, number: int, length: int = LONG) -> list[int]:
    """The tokens of an undisturbed run on one worker, under a cache of its own."""
    client.submit(f"reference-{number}", prompt(number, length), salt="reference")
    return await client.result(f"reference-{number}")


@pytest.mark.parametrize("shm", [False, True])
async def test_tokens_are_the_same_as_aggregated(
    stack: AsyncExitStack, tmp_path: Path, shm: bool
) -> None:
    shm_dir = str(tmp_path) if shm else ""
    p, d, alone = await start(stack, "p", "d", "alone", shm_dir=shm_dir)
    to_d, to_alone = await connect(stack, d), await connect(stack, alone)
    for number, length in enumerate([1, 15, 16, 17, 64, 65, 200, 1000]):
        to_alone.submit(f"r{number}", prompt(number, length))
        to_d.submit(f"r{number}", prompt(number, length), p.peer)
    for number in range(8):
        rid = f"r{number}"
        assert await to_d.result(rid) == await to_alone.result(rid)
        assert to_d.first[rid].prefill_worker == "p"
        assert to_d.first[rid].kv_bytes > 0
        assert to_alone.first[rid].prefill_worker == ""
    for worker in (p, d, alone):
        await worker.assert_clean()
    counters = (await d.state())["counters"]
    assert any('backend="shm"' in name for name in counters) == shm, counters
    metrics = await d.get("/metrics")
    assert f'backend="{"shm" if shm else "tcp"}",direction="in"' in metrics.text
    answer = await d.post("/admin/probe", host=p.peer.host, port=p.peer.port, num_blocks=8)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert (body["ok"], body["transport"]) == (True, "shm" if shm else "tcp")
    assert body["bytes"] == 8 * 2 * 2 * 16 * 8
    for worker in (p, d):
        await worker.assert_clean()


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
async def test_death_or_freeze_of_the_prefill_worker(stack: AsyncExitStack, blow: int) -> None:
    """The next peer, or the decode worker itself, takes over; the client sees a pause."""
    slow, slow_too, spare, d = await start(stack, "slow", "slow-too", "spare", "d")
    client = await connect(stack, d)
    length = 3 * LONG  # D has room for both
    client.submit("to-spare", prompt(1, length), slow.peer, spare.peer)
    client.submit("to-itself", prompt(2, length), slow_too.peer)
    await asyncio.gather(prefilling(slow), prefilling(slow_too))
    await slow.kill_all(blow)
    await slow_too.kill_all(blow)
    tokens = await client.result("to-spare"), await client.result("to-itself")
    assert client.first["to-spare"].prefill_worker == "spare"
    assert client.first["to-itself"].prefill_worker == ""
    assert tokens == (
        await reference(client, 1, length),
        await reference(client, 2, length),
    )
    for worker in (spare, d):
        await worker.assert_clean()
    if blow == signal.SIGSTOP:
        slow.thaw()
        slow_too.thaw()
        # Awake again, with news for a session that is over: dropped, cleaned up, usable again.
        await slow.assert_clean()
        client.submit("again", prompt(3, 64), slow.peer)
        assert await client.result("again") == await reference(client, 3, 64)
        await d.assert_clean()


async def test_death_of_the_decode_worker_frees_leases_at_once(stack: AsyncExitStack) -> None:
    slow, d = await start(stack, "slow", "d", flags=("--lease-seconds", "3600"))
    client = await connect(stack, d)
    client.submit("lost", prompt(1, ENDLESS), slow.peer)
    await prefilling(slow)
    await d.kill_all()
    await slow.assert_clean()
    assert await slow.counter("kv_lost_leases_total") == 1


async def test_another_revision_is_refused_at_the_handshake(stack: AsyncExitStack) -> None:
    (p,) = await start(stack, "p", flags=("--revision", "other"))
    (d,) = await start(stack, "d")
    client = await connect(stack, d)
    client.submit("r", prompt(1), p.peer)
    assert await client.result("r") == await reference(client, 1, 200)
    assert client.first["r"].prefill_worker == ""
    await d.assert_clean()
    assert await p.counter("kv_refused_pairings_total") >= 1
    answer = await d.post("/admin/probe", host=p.peer.host, port=p.peer.port)
    assert answer.status_code == 502
    assert "compatibility hash" in answer.json()["error"]


async def test_cancel_while_fetching(stack: AsyncExitStack) -> None:
    slow, d = await start(stack, "slow", "d")
    client = await connect(stack, d)
    client.submit("r", prompt(1, ENDLESS), slow.peer)
    await prefilling(slow)
    client.cancel("r")
    for worker in (slow, d):
        await worker.assert_clean()
    client.submit("leaves", prompt(2, ENDLESS), slow.peer)
    await prefilling(slow)
    await client.close()
    for worker in (slow, d):
        await worker.assert_clean()


async def test_an_idle_connection_still_works(stack: AsyncExitStack) -> None:
    """Far more than three heartbeats without a request, then the same connection carries one."""
    p, d = await start(stack, "p", "d", flags=("--lease-seconds", "0.5"))
    client = await connect(stack, d)
    client.submit("first", prompt(1), p.peer)
    await client.result("first")
    reports: int = (await d.state())["reports"]

    async def idle_for_long() -> bool:
        return bool((await d.state())["reports"] > reports + 6)  # one report each half second

    await until(idle_for_long, "idle time")
    client.submit("second", prompt(2), p.peer)
    assert await client.result("second") == await reference(client, 2, 200)
    assert client.first["second"].prefill_worker == "p"
    await d.assert_clean()
    assert await d.counter("kv_dials_total") == 1


async def test_drain_waits_for_leases_then_exits(stack: AsyncExitStack) -> None:
    slow, d = await start(stack, "slow", "d")
    client, to_slow = await connect(stack, d), await connect(stack, slow)
    length = 4 * LONG
    client.submit("r", prompt(1, length), slow.peer)
    await prefilling(slow)
    slow.kill(signal.SIGTERM)
    await until(lambda: to_slow.state and to_slow.state.draining, "the drain mark")
    to_slow.submit("new", prompt(2))
    await until(lambda: "new" in to_slow.refused, "the refusal")
    assert to_slow.refused["new"].code == "draining"
    client.submit("late", prompt(3), slow.peer)
    await client.result("late")
    assert client.first["late"].prefill_worker == "", "a draining worker took a prefill"
    assert await client.result("r") == await reference(client, 1, length)
    assert client.first["r"].prefill_worker == "slow", "the drain did not wait for the lease"
    assert await slow.wait_exit() == 0, slow.stderr.decode()
    await d.assert_clean()


async def test_a_prefill_worker_that_corrupts_kv_is_named_and_left_alone(
    stack: AsyncExitStack,
) -> None:
    """Every third write changes a bit on its way, so a check of four patterns never passes.

    The client sees right tokens all the time.
    """
    good, d, alone = await start(stack, "good", "d", "alone")
    bad = await WorkerProcess.start(
        "bad", TANDEM_FAULTS="pages:corrupt@1/3", TANDEM_FAULTS_ALLOWED="true"
    )
    stack.push_async_callback(bad.stop)
    to_d, to_alone = await connect(stack, d), await connect(stack, alone)

    async def trouble() -> bool:
        number = len(to_d.first)
        to_alone.submit(f"r{number}", prompt(number, 300))
        to_d.submit(f"r{number}", prompt(number, 300), bad.peer, good.peer)
        assert await to_d.result(f"r{number}") == await to_alone.result(f"r{number}")
        assert to_d.first[f"r{number}"].prefill_worker in ("bad", "good")
        return any(pair["out_of_use"] for pair in (await d.state())["troubles"])

    await until(trouble, "the pair to be taken out of use")
    (pair,) = (await d.state())["troubles"]
    assert (pair["worker_id"], pair["transport"]) == ("bad", "tcp")
    assert "checksum" in pair["reason"]
    to_d.submit("after", prompt(99, 300), bad.peer, good.peer)
    await to_d.result("after")
    assert to_d.first["after"].prefill_worker == "good"
    assert b'kv_pair_out_of_use{peer="bad"} 1.0' in (await d.get("/metrics")).content


async def test_both_sides_say_what_they_hold(stack: AsyncExitStack) -> None:
    """The dump names the request, the epoch and the other worker, and is empty afterwards."""
    slow, d = await start(stack, "slow", "d")
    client = await connect(stack, d)
    length = ENDLESS
    client.submit("r", prompt(1, length), slow.peer)
    await prefilling(slow)
    on_d, on_p = [(await worker.get_admin("/admin/leases")).json() for worker in (d, slow)]
    (fetch,), (push,) = on_d["fetches"], on_p["pushes"]
    assert (fetch["rid"], fetch["worker_id"], fetch["state"]) == ("r", "slow", "filling")
    assert (push["rid"], push["worker_id"], push["state"]) == ("r", "d", "pushing")
    assert push["epoch"] == fetch["epoch"]
    assert len(fetch["blocks"]) == on_d["blocks"]["leased"] == length // 16
    (routed,), (remote,) = on_d["requests"], on_p["requests"]
    assert (routed["rid"], routed["kind"], routed["state"], routed["leased"]) == (
        *("r", "routed", "fetching", True),
    )
    assert remote["kind"] == "remote"
    assert on_d["pushes"] == on_p["fetches"] == []
    client.cancel("r")
    for worker in (slow, d):
        await worker.assert_clean()
        held = (await worker.get_admin("/admin/leases")).json()
        assert held["requests"] == held["fetches"] == held["pushes"] == []


async def test_a_test_worker_dies_where_it_is_told_to(stack: AsyncExitStack) -> None:
    """At its second commit: the first one is that of the page that tries the transport out."""
    p = await WorkerProcess.start("p", TANDEM_FAULTS="commit:kill@#2", TANDEM_FAULTS_ALLOWED="true")
    stack.push_async_callback(p.stop)
    (d,) = await start(stack, "d")
    client = await connect(stack, d)
    client.submit("r", prompt(1), p.peer)
    assert await client.result("r") == await reference(client, 1, 200)
    assert client.first["r"].prefill_worker == ""
    assert await p.wait_exit() == 1
    log = p.stderr.decode()
    assert "this worker injects faults: TANDEM_FAULTS is commit:kill@#2" in log
    assert "injected: kill at commit" in log
    assert "signal 9" in log
    await d.assert_clean()
