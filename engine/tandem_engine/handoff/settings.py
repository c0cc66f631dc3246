"""The hand-off's settings, fixed at its start."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from tandem_engine.config import WorkerConfig
from tandem_engine.doctor.examine import look_around, no_peer_memory, ruled_out
from tandem_engine.handoff.errors import HandoffUnavailable
from tandem_wire.handoff import TransportName, transport_name

_LEAST_RING_MIB: Final = 8
_SLOTS: Final = 4
"""Of nixl's ring in a GPU's memory: some are written while others are emptied."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HandoffSettings:
    """Times in seconds, sizes in bytes."""

    worker_id: str
    boot_id: str
    host: str = "0.0.0.0"  # address of the bootstrap port
    bootstrap_port: int = 0  # 0: a free one
    transport: TransportName | Literal["auto"] = "auto"  # auto: the best that both sides can do
    checksum: bool = True
    lease_seconds: float = 10.0  # P drops a push this long after D's last sign of life
    heartbeat_seconds: float = 2.0  # on every control connection; three misses mean death
    stall_seconds: float = 20.0  # D gives up an attempt after this long without progress
    dial_seconds: float = 3.0  # connect and handshake
    blacklist_seconds: float = 10.0  # longest time that a failed peer is passed over
    fault_limit: int = 3  # so many link faults in the window take a pair out of use
    fault_window_seconds: float = 60.0
    out_of_use_seconds: float = 30.0  # until a check; doubles with each one that fails
    max_out_of_use_seconds: float = 600.0
    shm_dir: str = ""  # directory shared with peers of this host; empty: no shm
    shm_ring_bytes: int = 64 << 20  # staging ring per session
    device_slot_bytes: int = 64 << 20  # one write from GPU to GPU
    device_ring_bytes: int = 256 << 20  # staging ring per session, in the GPU's memory
    nixl_memory: Literal["auto", "host"] = "auto"  # host: rings of nixl are not put on a GPU
    nixl_slot_bytes: int = 64 << 20  # one write of nixl's from GPU to GPU
    nixl_ring_bytes: int = 256 << 20  # staging ring of nixl's per session, in the GPU's memory
    no_peer_memory: str = ""  # why RDMA devices can't reach the GPU's memory; empty: they can
    num_streams: int = 2  # data connections per session
    faults: str = ""  # TANDEM_FAULTS; empty: none
    write_bytes: int = 0  # size to aim for in one write of pages; 0: what suits the store
    ruled_out: Mapping[TransportName, str] = field(default_factory=dict)
    """Transports that can't work on this machine, by the checks of its start, and why."""

    @classmethod
    def from_worker(cls, config: WorkerConfig) -> "HandoffSettings":
        """Take a worker's flags; the beat comes several times within a lease.

        Raises HandoffUnavailable when a variable of the environment makes no sense.
        """
        checks = look_around(config.transfer, config.shm_dir)
        return cls(
            worker_id=config.worker_id,
            boot_id=config.boot_id,
            host=config.host,
            bootstrap_port=config.bootstrap_port,
            transport=transport_name(config.transfer),
            checksum=config.checksum,
            lease_seconds=config.lease_seconds,
            heartbeat_seconds=min(2.0, config.lease_seconds / 5),
            stall_seconds=max(2.0, 2 * config.lease_seconds),
            shm_dir=config.shm_dir,
            ruled_out=ruled_out(checks),
            no_peer_memory=no_peer_memory(checks),
            faults=config.faults,
            **read_nixl_ring(os.environ),
        )


def read_nixl_ring(environ: Mapping[str, str]) -> dict[str, Any]:
    """The settings that `NIXL_RING_MEMORY` and `NIXL_RING_MIB` ask for.

    Raises HandoffUnavailable.
    """
    found: dict[str, Any] = {}
    memory, size = environ.get("NIXL_RING_MEMORY", ""), environ.get("NIXL_RING_MIB", "")
    if memory not in ("", "auto", "host"):
        raise HandoffUnavailable(f"NIXL_RING_MEMORY is {memory}; set it to auto or host")
    if memory:
        found["nixl_memory"] = memory
    if size:
        if not size.isdecimal() or int(size) < _LEAST_RING_MIB:
            raise HandoffUnavailable(
                f"NIXL_RING_MIB is {size}; set it to a number of MiB from {_LEAST_RING_MIB} on"
            )
        num_bytes = int(size) << 20
        found |= {"nixl_ring_bytes": num_bytes, "nixl_slot_bytes": num_bytes // _SLOTS}
    return found
