"""The transports that every test of the hand-off runs over. A new one joins here, and nowhere else.

All of them work on a machine without a GPU; for `cudaIpc` host memory stands in for the GPU's.
"""

from typing import Final

RINGS: Final = ("shm", "cudaIpc")
"""Those whose pages go through a ring of D's that P maps."""

TRANSPORTS: Final = ("tcp", *RINGS)
