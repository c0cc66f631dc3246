"""Workers in processes of their own, which a test may stop and kill."""

import multiprocessing
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.connection import Connection
from typing import Any, Protocol, TypeAlias

Pipe: TypeAlias = "Connection[Any, Any]"


class Start(Protocol):
    """Runs `target(pipe, *args)` in a child until the test ends; the other end of the pipe."""

    def __call__(self, target: Callable[..., None], *args: Any) -> Pipe: ...


def starter(stack: ExitStack) -> Start:
    context = multiprocessing.get_context("spawn")

    def start(target: Callable[..., None], *args: Any) -> Pipe:
        ours, theirs = context.Pipe()
        child = context.Process(target=target, args=(theirs, *args), daemon=True)
        child.start()
        stack.callback(child.join)
        stack.callback(child.kill)
        return ours

    return start
