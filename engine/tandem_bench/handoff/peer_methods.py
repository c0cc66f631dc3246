"""Ways to hand memory of a GPU to another process, and the KV that `peer-memory` sends."""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
from cuda.bindings import driver

from tandem_bench.errors import LinkError
from tandem_bench.gpu.timing import seconds_eager
from tandem_kernels.transfer import kernel as transfer

_HANDLES: Final = driver.CUmemAllocationHandleType
SIZES: Final = {"134 MB": 1 << 27, "1.07 GB": 1 << 30}
"""KV of 1,024 and of 8,192 tokens of Llama-3.1-8B."""
REPEATS: Final = 9
LAYERS: Final = 32
BLOCKS: Final = 128
"""Of 8 MiB: 64 tokens of all layers of Llama-3.1-8B."""


def rate(num_bytes: int, call: Callable[[], object]) -> float:
    """GB/s, the median of a few calls after one that is not counted."""
    call()
    return num_bytes / seconds_eager(call, REPEATS) / 1e9


def done(result: tuple[Any, ...], call: str = "") -> Any:
    """The values of a driver call.

    Raises:
        LinkError: it failed; names the error and the call.
    """
    error, *values = result
    if error != driver.CUresult.CUDA_SUCCESS:
        raise LinkError(f"{call or 'a copy'}: {error.name} ({int(error)})")
    return values[0] if values else None


def read_handle(handle: Any) -> bytes:
    """The 64 bytes of a handle; the bindings' versions name them differently."""
    return ctypes.string_at(handle.getPtr(), 64)


def filled_handle(kind: Any, content: bytes) -> Any:
    """A handle of a kind with these 64 bytes."""
    handle = kind()
    ctypes.memmove(handle.getPtr(), content, 64)
    return handle


class MappedBytes:
    """An address as what torch and Triton take for an array."""

    def __init__(self, pointer: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape = shape
        self.dtype = dtype
        self._pointer = pointer

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Bytes."""
        return {"data": (self._pointer, False), "shape": self.shape, "typestr": "|u1", "version": 2}

    def data_ptr(self) -> int:
        """The address."""
        return self._pointer

    def is_contiguous(self) -> bool:
        """Always."""
        return True


def describe_pointer(pointer: int, device: int) -> str:
    """The device on which torch takes mapped memory to be."""
    try:
        found = torch.as_tensor(MappedBytes(pointer, (1 << 20,), torch.uint8))
    except (RuntimeError, ValueError) as error:
        return f"torch: {str(error).splitlines()[0]}"
    kind = "a copy" if found.data_ptr() != pointer else str(found.device)
    return f"torch: {kind} (own: cuda:{device})"


@dataclass(slots=True)
class Region:
    """Memory of a GPU that is mapped here; with a handle for others where it is our own."""

    pointer: int
    size: int
    handle: bytes = b""
    fd: int | None = None
    allocation: Any = None
    """Of cuMemCreate."""
    opened: bool = False
    """By cuIpcOpenMemHandle."""

    def view(self) -> torch.Tensor:
        """Its bytes."""
        return torch.as_tensor(MappedBytes(self.pointer, (self.size,), torch.uint8))

    def release(self) -> None:
        """Unmap it; and free it where it is ours."""
        torch.cuda.synchronize()
        if self.allocation is not None:
            done(driver.cuMemUnmap(self.pointer, self.size), "cuMemUnmap")
            done(driver.cuMemAddressFree(self.pointer, self.size), "cuMemAddressFree")
            done(driver.cuMemRelease(self.allocation), "cuMemRelease")
        elif self.opened:
            done(driver.cuIpcCloseMemHandle(self.pointer), "cuIpcCloseMemHandle")
        else:
            done(driver.cuMemFree(self.pointer), "cuMemFree")


class Method(Protocol):
    """A way of sharing."""

    def export(self, device: int, size: int) -> Region:
        """Allocate memory that others can open."""

    def open(self, device: int, size: int, handle: bytes, fd: int | None) -> Region:
        """Map such memory for a device of this process."""


class LegacyIpc:
    """cudaIpcGetMemHandle and cudaIpcOpenMemHandle: 64 bytes that name an allocation."""

    def export(self, device: int, size: int) -> Region:
        """With cuMemAlloc."""
        pointer = int(done(driver.cuMemAlloc(size), "cuMemAlloc"))
        handle = done(driver.cuIpcGetMemHandle(pointer), "cuIpcGetMemHandle")
        return Region(pointer, size, read_handle(handle))

    def open(self, device: int, size: int, handle: bytes, fd: int | None) -> Region:
        """With access from the current device."""
        named = filled_handle(driver.CUipcMemHandle, handle)
        lazy = driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
        pointer = done(driver.cuIpcOpenMemHandle(named, lazy), "cuIpcOpenMemHandle")
        return Region(int(pointer), size, opened=True)


class VirtualMemory:
    """cuMemCreate, with a file descriptor or a fabric handle for others."""

    def __init__(self, kind: Any) -> None:
        self._kind = kind

    def export(self, device: int, size: int) -> Region:
        """Allocate on the device, map it here."""
        wanted = driver.CUmemAllocationProp()
        wanted.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        wanted.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        wanted.location.id = device
        wanted.requestedHandleTypes = self._kind
        allocation = done(driver.cuMemCreate(size, wanted, 0), "cuMemCreate")
        shared = done(
            driver.cuMemExportToShareableHandle(allocation, self._kind, 0),
            "cuMemExportToShareableHandle",
        )
        region = self._map(device, size, allocation)
        if self._kind == _HANDLES.CU_MEM_HANDLE_TYPE_FABRIC:
            region.handle = read_handle(shared)
        else:
            region.fd = int(shared)
        return region

    def open(self, device: int, size: int, handle: bytes, fd: int | None) -> Region:
        """Import it, and map it for a device of ours."""
        if self._kind == _HANDLES.CU_MEM_HANDLE_TYPE_FABRIC:
            named = filled_handle(driver.CUmemFabricHandle, handle)
            shared = named.getPtr()
        else:
            assert fd is not None
            shared = fd
        allocation = done(
            driver.cuMemImportFromShareableHandle(shared, self._kind),
            "cuMemImportFromShareableHandle",
        )
        return self._map(device, size, allocation)

    def _map(self, device: int, size: int, allocation: Any) -> Region:
        pointer = done(driver.cuMemAddressReserve(size, 0, 0, 0), "cuMemAddressReserve")
        done(driver.cuMemMap(pointer, size, 0, allocation, 0), "cuMemMap")
        access = driver.CUmemAccessDesc()
        access.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        access.location.id = device
        access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        done(driver.cuMemSetAccess(pointer, size, [access], 1), "cuMemSetAccess")
        return Region(int(pointer), size, allocation=allocation)


METHODS: Final[dict[str, Method]] = {
    "VMM, file descriptor": VirtualMemory(_HANDLES.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR),
    "CUDA IPC": LegacyIpc(),
    "VMM, fabric": VirtualMemory(_HANDLES.CU_MEM_HANDLE_TYPE_FABRIC),
}


class Content:
    """A cache with the same random KV on every device, and its pages in another order."""

    def __init__(self, device: int) -> None:
        self._device = torch.device("cuda", device)
        torch.cuda.set_device(self._device)
        generator = torch.Generator(self._device).manual_seed(5)
        shape = (LAYERS, 2, BLOCKS, 8, 64, 128)
        self._cache = torch.empty(shape, dtype=torch.bfloat16, device=self._device)
        self._cache.normal_(generator=generator)
        order = torch.randperm(BLOCKS, device=self._device, generator=generator)
        self._order = [order[n : n + 1] for n in range(BLOCKS)]
        self.plain = self._cache.flatten().view(torch.uint8)
        packed = self._cache[:, :, order].permute(2, 0, 1, 3, 4, 5).contiguous()
        self.packed = packed.flatten().view(torch.uint8)
        self.wait()

    @property
    def stream(self) -> int:
        """On which torch works."""
        return int(torch.cuda.current_stream().cuda_stream)

    def wait(self) -> None:
        """Until the device has done everything."""
        torch.cuda.synchronize(self._device)

    def spare(self) -> torch.Tensor:
        """Room for all of it."""
        return torch.full_like(self.plain, 0xFF)

    def pack_into(self, target: int) -> None:
        """Each page, gathered from all layers by a kernel that writes to the address."""
        shape = (LAYERS, 2, 1, *self._cache.shape[3:])
        for number, block in enumerate(self._order):
            room: Any = MappedBytes(target + (number << 23), shape, torch.bfloat16)
            transfer.pack(self._cache, block, range(LAYERS), out=room)

    def same(self, found: torch.Tensor, expected: torch.Tensor) -> bool:
        """Whether the bytes are those of the beginning of what was sent."""
        size = found.shape[0]
        return torch.equal(found.view(torch.int64), expected[:size].view(torch.int64))
