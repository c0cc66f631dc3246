"""The hand-off's settings, fixed at its start."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from tandem_engine.config import WorkerConfig
from tandem_engine.doctor.examine import look_around, ruled_out
from tandem_wire.handoff import TransportName, transport_name


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
    num_streams: int = 2  # data connections per session
    faults: str = ""  # TANDEM_FAULTS; empty: none
    write_bytes: int = 0  # size to aim for in one write of pages; 0: what suits the store
    ruled_out: Mapping[TransportName, str] = field(default_factory=dict)
    """Transports that can't work on this machine, by the checks of its start, and why."""

    @classmethod
    def from_worker(cls, config: WorkerConfig) -> "HandoffSettings":
        """Take a worker's flags; the beat comes several times within a lease."""
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
            ruled_out=ruled_out(look_around(config.transfer, config.shm_dir)),
            faults=config.faults,
        )
