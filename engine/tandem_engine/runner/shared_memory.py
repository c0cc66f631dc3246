"""Memory of a GPU that another process of the host can map, by a file descriptor.

It is made by `cuMemCreate` and not by torch: only such memory has a descriptor, and only a
descriptor works between processes that see one GPU each, in whatever namespaces. CUDA's IPC handles
need a common PID namespace.
"""

import os
import weakref
from typing import Any, Final

import torch
from cuda.bindings import driver

from tandem_engine.errors import StagingUnavailableError

_HANDLE: Final = driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR


def done(result: tuple[Any, ...], call: str) -> Any:
    """The value of a call of the driver. Raises StagingUnavailableError, with call and error."""
    error, *values = result
    if error != driver.CUresult.CUDA_SUCCESS:
        raise StagingUnavailableError(f"{call}: {error.name} ({int(error)})")
    return values[0] if values else None


class SharedMemory:
    """A range of addresses of this process with memory of some GPU behind it."""

    def __init__(self, device: torch.device, allocation: Any, size: int, descriptor: int) -> None:
        """Take over both and map them. Raises StagingUnavailableError."""
        self.size = size
        self.descriptor = descriptor
        self._allocation = allocation
        self._device = device
        self.pointer = 0
        self._mapped = False
        try:
            self._map()
        except StagingUnavailableError:
            self.close()
            raise

    @classmethod
    def make(cls, device: torch.device, num_bytes: int) -> "SharedMemory":
        """Allocate on `device`, at least `num_bytes`. Raises StagingUnavailableError."""
        torch.cuda.set_device(device)
        wanted = driver.CUmemAllocationProp()
        wanted.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        wanted.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        wanted.location.id = device.index
        wanted.requestedHandleTypes = _HANDLE
        size = _round_up(wanted, num_bytes)
        allocation = done(driver.cuMemCreate(size, wanted, 0), "cuMemCreate")
        try:
            descriptor = done(
                driver.cuMemExportToShareableHandle(allocation, _HANDLE, 0),
                "cuMemExportToShareableHandle",
            )
        except StagingUnavailableError:
            driver.cuMemRelease(allocation)
            raise
        return cls(device, allocation, size, int(descriptor))

    @classmethod
    def open(cls, device: torch.device, num_bytes: int, descriptor: int) -> "SharedMemory":
        """Map what another process has made, for `device`. Raises StagingUnavailableError."""
        torch.cuda.set_device(device)
        allocation = done(
            driver.cuMemImportFromShareableHandle(descriptor, _HANDLE),
            "cuMemImportFromShareableHandle",
        )
        try:
            size = _round_up(
                done(
                    driver.cuMemGetAllocationPropertiesFromHandle(allocation),
                    "cuMemGetAllocationPropertiesFromHandle",
                ),
                num_bytes,
            )
        except StagingUnavailableError:
            driver.cuMemRelease(allocation)
            raise
        return cls(device, allocation, size, -1)

    def _map(self) -> None:
        size = self.size
        self.pointer = int(done(driver.cuMemAddressReserve(size, 0, 0, 0), "cuMemAddressReserve"))
        done(driver.cuMemMap(self.pointer, size, 0, self._allocation, 0), "cuMemMap")
        self._mapped = True
        access = driver.CUmemAccessDesc()
        access.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        access.location.id = self._device.index
        access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        done(driver.cuMemSetAccess(self.pointer, size, [access], 1), "cuMemSetAccess")

    def view(self, *, gives_up: bool = False) -> torch.Tensor:
        """Its bytes as a tensor, in the process that made it.

        With `gives_up`, the memory is unmapped when no tensor of it is left, and not before.
        """
        found = _Bytes(self.pointer, self.size)
        if gives_up:
            weakref.finalize(found, self._close_when_idle).atexit = False
        return torch.as_tensor(found)

    def _close_when_idle(self) -> None:
        torch.cuda.synchronize(self._device)
        self.close()

    def write(self, at: int, source: torch.Tensor, stream: torch.cuda.Stream) -> None:
        """Copy a contiguous tensor of our GPU to byte `at`, in `stream`.

        By a copy engine: a kernel that writes to another GPU takes multiprocessors from the steps.
        Raises StagingUnavailableError.
        """
        num_bytes = source.numel() * source.element_size()
        call = driver.cuMemcpyDtoDAsync(
            self.pointer + at, source.data_ptr(), num_bytes, stream.cuda_stream
        )
        done(call, "cuMemcpyDtoDAsync")

    def close(self) -> None:
        """Unmap it. The memory lives on while another process maps it. Safe to call twice."""
        if self._mapped:
            driver.cuMemUnmap(self.pointer, self.size)
            self._mapped = False
        if self.pointer:
            driver.cuMemAddressFree(self.pointer, self.size)
            self.pointer = 0
        if self._allocation is not None:
            driver.cuMemRelease(self._allocation)
            self._allocation = None
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def bytes_at(pointer: int, size: int) -> torch.Tensor:
    """Memory of the current GPU as a tensor."""
    return torch.as_tensor(_Bytes(pointer, size))


class _Bytes:
    """An address as what torch takes for an array."""

    def __init__(self, pointer: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "data": (pointer, False),
            "shape": (size,),
            "typestr": "|u1",
            "version": 2,
        }


def _round_up(properties: Any, num_bytes: int) -> int:
    smallest = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
    unit = int(
        done(
            driver.cuMemGetAllocationGranularity(properties, smallest),
            "cuMemGetAllocationGranularity",
        )
    )
    return -(-num_bytes // unit) * unit
