"""What the protocol's model has found, each as one fixed course of events."""

from collections.abc import Iterator

import pytest

from tandem_engine.handoff.tests.protocol.world import World, deterministic
from tandem_engine.scheduler.request import Kind, Request

PROMPT = [40 + i for i in range(22)]


@pytest.fixture(name="world")
def world_fixture() -> Iterator[World]:
    with deterministic():
        world = World("mooncake")
        try:
            yield world
            world.end()
        finally:
            world.dispose()


def remote(world: World, name: str) -> list[Request]:
    """The prompts that a worker computes or pushes for others."""
    requests = world.workers[name].core.scheduler.requests
    return [request for request in requests if request.kind is Kind.REMOTE]


def push_until_posted(world: World) -> None:
    """Worker a asks b for a prompt; b's first writes are posted and don't land."""
    world.meet()
    world.holds = {"network"}
    world.router.ask(PROMPT, 2, "a", ["b"])
    world.rest()
    assert len(world.fabric.posted) == 2
    assert len(remote(world, "b")) == 1


def test_a_session_that_ends_while_a_push_is_being_dropped_frees_its_blocks(world: World) -> None:
    push_until_posted(world)
    world.router.cancel(world.router.chats[0])
    world.rest()  # b has the fence, and waits for its writes
    (key,) = [request.key for request in remote(world, "b")]
    for here in world.network.sockets:
        world.network.cut(here)
    world.rest()
    assert key not in [request.key for request in remote(world, "b")]
    assert world.workers["b"].service.num_leases() == 0


def test_a_fence_waits_for_the_writes_that_a_failed_push_waits_for(world: World) -> None:
    push_until_posted(world)
    post = world.fabric.posted.pop()
    post.is_done, post.failure = True, ValueError("bad status")
    world.rest()  # the push has failed, and waits for its other write
    world.router.cancel(world.router.chats[0])
    world.rest()  # the fence has come, too
    assert len(world.fabric.posted) == 1
    assert len(remote(world, "b")) == 1
    assert world.workers["a"].service.num_leases() == 1
    world.holds.clear()
    world.rest()
    assert not remote(world, "b")
    assert world.workers["a"].service.num_leases() == 0


def test_a_fetch_that_is_cancelled_while_a_fence_is_waited_for_leaves_no_task(world: World) -> None:
    """The first page of a new session doesn't come, so it is fenced; then the client leaves."""
    world.holds = {"network"}
    world.router.ask(PROMPT, 2, "a", ["b"])
    world.pass_time(3.0)  # longer than a first page may take, shorter than a fence
    assert world.workers["a"].service.num_leases() == 1
    assert any("Event.wait" in repr(task) for task in world.workers["a"].loop.open_tasks())
    world.router.cancel(world.router.chats[0])
    world.rest()
    assert world.workers["a"].service.num_leases() == 0
    left = [task for task in world.workers["a"].loop.open_tasks() if "Event.wait" in repr(task)]
    assert not left
