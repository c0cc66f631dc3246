"""How often workers are asked for their role and what moves KV to them, and what is kept of it."""

from typing import Any

from tandem_operator.clients.workers import WorkerClient
from tandem_operator.facts.worker import Links, WorkerPod, WorkerState
from tandem_operator.observe.links import LOOK_SECONDS, MAX_LOOKS, LinkObserver
from tandem_operator.pair import Role
from tandem_operator.tests.facts import make_pod


class Answers(WorkerClient):
    """Workers whose sessions use the transport that the test says; None: no answer."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.transport: str | None = "shm"
        self.role = "decode"

    async def state(self, ip: str, port: int, seconds: float = 1.0) -> WorkerState | None:
        self.asked.append(ip)
        if self.transport is None:
            return None
        links = Links({"p": self.transport})
        return WorkerState(0, 0, draining=False, role=self.role, links=links)

    def take(self) -> list[str]:
        taken, self.asked = self.asked, []
        return taken


class Clock:
    """Moves when the test says."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def workers(number: int, **changes: Any) -> tuple[WorkerPod, ...]:
    return tuple(make_pod(f"d{n}", ip=f"10.0.0.{n}", **changes) for n in range(number))


async def test_a_look_is_kept_for_a_while_and_renewed() -> None:
    answers, clock = Answers(), Clock()
    links, pods = LinkObserver(answers, clock), workers(2)
    found = await links.add("s", pods)
    assert [pod.links for pod in found] == [Links({"p": "shm"})] * 2
    assert len(answers.take()) == 2
    answers.transport = "tcp"
    clock.now += LOOK_SECONDS - 1
    assert (await links.add("s", pods))[0].links == Links({"p": "shm"})
    assert answers.take() == []
    clock.now += 1
    assert (await links.add("s", pods))[0].links == Links({"p": "tcp"})
    answers.transport = None
    clock.now += LOOK_SECONDS
    assert (await links.add("s", pods))[0].links is None
    await answers.close()


async def test_only_workers_that_are_ready_are_asked() -> None:
    answers = Answers()
    links = LinkObserver(answers, Clock())
    pods = (
        *workers(1, ready=False, uid="starts"),
        *workers(1, role=Role.PREFILL, uid="sends"),
        *workers(1),
    )
    found = await links.add("s", pods)
    assert [pod.links for pod in found] == [None, None, Links({"p": "shm"})]
    assert [pod.told_role for pod in found] == ["", "decode", "decode"]
    assert len(answers.take()) == 2
    found = await LinkObserver(answers, Clock()).add("s", pods, links=False)
    assert [pod.links for pod in found] == [None] * 3
    assert [pod.told_role for pod in found] == ["", "decode", "decode"]
    await answers.close()


async def test_one_with_another_role_is_asked_at_every_look() -> None:
    answers = Answers()
    links, pods = LinkObserver(answers, Clock()), workers(2)
    answers.role = "both"
    assert {pod.told_role for pod in await links.add("s", pods)} == {"both"}
    answers.role = "decode"
    assert {pod.told_role for pod in await links.add("s", pods)} == {"decode"}
    answers.take()
    await links.add("s", pods)
    assert answers.take() == []
    await answers.close()


async def test_a_large_fleet_is_asked_in_turns() -> None:
    answers, clock = Answers(), Clock()
    links, pods = LinkObserver(answers, clock), workers(MAX_LOOKS + 8)
    first = await links.add("s", pods)
    assert sum(pod.links is not None for pod in first) == MAX_LOOKS
    asked = set(answers.take())
    clock.now += 1
    second = await links.add("s", pods)
    assert all(pod.links is not None for pod in second)
    rest = set(answers.take())
    assert len(rest) == 8
    assert not asked & rest
    await answers.close()


async def test_a_service_and_a_pod_that_are_gone_are_forgotten() -> None:
    answers = Answers()
    links = LinkObserver(answers, Clock())
    await links.add("s", workers(2))
    await links.add("s", workers(1))
    answers.take()
    await links.add("s", workers(2))
    assert len(answers.take()) == 1, "the one that was away is asked anew"
    links.forget("s")
    await links.add("s", workers(2))
    assert len(answers.take()) == 2
    await answers.close()
