"""The queue: one pass per key at a time, nothing lost."""

import asyncio
from typing import Any

from tandem_operator.runtime.workqueue import Key, WorkQueue
from tandem_operator.tests.polling import until

A, B = ("ns", "a"), ("ns", "b")


def make(work: Any, **settings: Any) -> WorkQueue:
    queue = WorkQueue(work, settle_seconds=0.005, first_backoff_seconds=0.01, **settings)
    queue.open()
    return queue


async def test_many_triggers_make_one_pass() -> None:
    passes: list[Key] = []

    async def work(key: Key) -> float | None:
        passes.append(key)
        return None

    queue = make(work)
    for _ in range(50):
        queue.trigger(A)
    queue.trigger(B)
    await until(lambda: len(passes) == 2)
    await until(lambda: not queue.known())
    assert sorted(passes) == [A, B]


async def test_a_trigger_during_a_pass_makes_another_and_never_two_at_once() -> None:
    running, most, passes = 0, 0, 0
    gate = asyncio.Event()

    async def work(key: Key) -> float | None:
        nonlocal running, most, passes
        running += 1
        most = max(most, running)
        passes += 1
        await gate.wait()
        running -= 1
        return None

    queue = make(work)
    queue.trigger(A)
    await until(lambda: running == 1)
    for _ in range(5):
        queue.trigger(A)
    gate.set()
    await until(lambda: passes == 2 and not queue.known())
    assert most == 1


async def test_a_failed_pass_is_repeated() -> None:
    passes = 0

    async def work(key: Key) -> float | None:
        nonlocal passes
        passes += 1
        if passes < 3:
            raise ValueError("not yet")
        return None

    queue = make(work)
    queue.trigger(A)
    await until(lambda: passes == 3 and not queue.known())


async def test_a_pass_may_ask_for_the_next() -> None:
    passes = 0

    async def work(key: Key) -> float | None:
        nonlocal passes
        passes += 1
        return 0.01 if passes < 3 else None

    queue = make(work)
    queue.trigger(A)
    await until(lambda: passes == 3)


async def test_a_sooner_trigger_wins_over_a_later_one() -> None:
    passes = 0

    async def work(key: Key) -> float | None:
        nonlocal passes
        passes += 1
        return 1000.0

    queue = make(work)
    queue.trigger(A, 1000.0)
    queue.trigger(A)
    await until(lambda: passes == 1)
    queue.trigger(A)
    await until(lambda: passes == 2)
    await queue.close()


async def test_a_paused_queue_starts_nothing() -> None:
    passes = 0

    async def work(key: Key) -> float | None:
        nonlocal passes
        passes += 1
        return None

    queue = make(work)
    queue.pause()
    queue.trigger(A)
    await until(lambda: queue.num_keys == 1)
    assert passes == 0
    queue.open()
    await until(lambda: passes == 1)


async def test_forgotten_keys_stay_away() -> None:
    async def work(key: Key) -> float | None:
        raise AssertionError("must not run")

    queue = make(work)
    queue.trigger(A, 1000.0)
    queue.forget(A)
    assert queue.known() == []
    queue.forget(B)
    await queue.close()


async def test_a_key_forgotten_in_its_pass_is_not_repeated() -> None:
    passes = 0
    entered, go_on = asyncio.Event(), asyncio.Event()

    async def work(key: Key) -> float | None:
        nonlocal passes
        passes += 1
        entered.set()
        await go_on.wait()
        raise RuntimeError("forbidden")

    queue = make(work)
    queue.trigger(A)
    await entered.wait()
    queue.forget(A)
    go_on.set()
    await until(lambda: queue.known() == [])
    assert passes == 1
    entered.clear()
    queue.trigger(A)  # it came back
    await until(lambda: passes == 2)
    await queue.close()
