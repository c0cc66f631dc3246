"""The transports that every test of the hand-off runs over. A new one joins here, and nowhere else.

All of them work on a machine without a GPU; for `cudaIpc` and `cudaIpcRing`
host memory stands in for the GPU's.
"""

import sys
from typing import Final

from tandem_wire.handoff import TransportName

HAS_MOONCAKE: Final = sys.version_info < (3, 14)
"""Whether there is a wheel of its library."""
LIBRARIES: Final[tuple[TransportName, ...]] = ("nixl", "mooncake") if HAS_MOONCAKE else ("nixl",)
RINGS: Final[tuple[TransportName, ...]] = ("shm", "cudaIpcRing", *LIBRARIES)
"""Those whose pages go through a ring of D's."""

TRANSPORTS: Final[tuple[TransportName, ...]] = ("tcp", "cudaIpc", *RINGS)
