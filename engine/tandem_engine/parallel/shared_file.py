"""Host memory that all ranks of a worker share."""

import mmap
import os

import numpy as np
import numpy.typing as npt


class SharedFile:
    """A file without a name that grows as needed, for one user at a time.

    Args:
        descriptor: the file that another process made; None: make a new one.
    """

    def __init__(self, descriptor: int | None = None) -> None:
        self._owned = descriptor is None
        self.descriptor = os.memfd_create("tandem-pages") if descriptor is None else descriptor
        self._bytes: npt.NDArray[np.uint8] = np.empty(0, np.uint8)

    def first(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        """The first `num_bytes` of the file. Only the process that made it can make it larger."""
        if num_bytes > len(self._bytes):
            if self._owned:
                os.ftruncate(self.descriptor, num_bytes)
            # An older mapping ends with the last array that views it.
            self._bytes = np.frombuffer(mmap.mmap(self.descriptor, num_bytes), np.uint8)
        return self._bytes[:num_bytes]

    def close(self) -> None:
        """Close the descriptor. Arrays that were handed out stay valid."""
        self._bytes = np.empty(0, np.uint8)
        os.close(self.descriptor)
