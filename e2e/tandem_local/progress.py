"""How long work reports where it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class ProgressEvent:
    """One step of something that takes a while."""

    stage: str
    """What is under way: `download`, `build`, `start`."""
    message: str
    """One line for people."""
    done: int | None = None
    """Units done, where they are counted."""
    total: int | None = None
    """Units in all, where that is known."""


Progress = Callable[[ProgressEvent], None]


def silent(event: ProgressEvent) -> None:
    """A Progress that reports to nobody."""
