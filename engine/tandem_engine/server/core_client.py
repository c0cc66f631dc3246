"""What the server needs of a core process."""

from collections.abc import AsyncIterator
from typing import Protocol

from tandem_engine.frames import FromCore, ToCore


class CoreClient(Protocol):
    """A running core: frames in, frames out. Implemented by `core.process.CoreProcess`."""

    @property
    def pid(self) -> int:
        """Process id of the core."""

    def send(self, message: ToCore) -> None:
        """Send a frame; returns at once."""

    def __aiter__(self) -> AsyncIterator[FromCore]:
        """Frames until `close`; raises CoreDiedError when the core ended by itself."""

    async def close(self, grace_seconds: float = 5.0) -> int:
        """End the core; its exit code."""
