"""Mooncake's transfer engines, as this process uses them.

What was tried of 0.3.13, and what follows from it:

- Opening a peer's segment holds a lock of the engine for up to 65 s if the peer is stopped, and
  every other write through that engine waits. So an engine serves one session at a time.
- An engine remembers what is behind a peer's name (address and port) for good. So it never meets
  another peer under a name that it knows.
- To destroy an engine takes up to a second in which no other thread of the interpreter runs. So
  none is destroyed: the next session takes one that is free, and the process ends without.
- `transfer_sync_write` keeps a core busy, and after its time limit the write goes on. So writes
  are submitted and polled, by a thread that can leave off at any time.
- A write is reported as completed once the peer has acknowledged that all of it is in its memory
  (second version of the library's protocol over TCP), or by the card (RDMA).
"""

import ctypes
import functools
import importlib.metadata
import ipaddress
import json
import os
import secrets
import threading
from typing import Any, Final

from tandem_engine.handoff.errors import TransportError
from tandem_engine.memory import MemoryRegion

NEEDED: Final = (0, 3, 13)
"""The first version that acknowledges a write over TCP when all of it is in place."""
_PACKAGES: Final = ("mooncake-transfer-engine-non-cuda", "mooncake-transfer-engine")
PIECE_BYTES: Final = 4 << 20
"""Writes of this size are faster than smaller ones, each of which waits for its acknowledgment."""
_FIRST_POLL_SECONDS: Final = 50e-6
_LAST_POLL_SECONDS: Final = 500e-6
_GREETING_BYTES: Final = 16

_lock: Final = threading.Lock()
_free: "Final[list[Engine]]" = []


def protocol() -> str:
    """What this worker's engines speak: tcp or rdma. Raises TransportError."""
    wanted = os.environ.get("MOONCAKE_PROTOCOL", "tcp")
    if wanted not in ("tcp", "rdma"):
        raise TransportError(f"MOONCAKE_PROTOCOL is {wanted}; set it to tcp or rdma")
    return wanted


def _devices() -> str:
    """The RDMA devices to use, with commas; empty: all."""
    return os.environ.get("MOONCAKE_DEVICE", "") if protocol() == "rdma" else ""


def load() -> Any:
    """The library's module. Raises TransportError, which says what is missing here."""
    # Read by the library when it is loaded, or when its first engine is made.
    os.environ["MC_TCP_ENABLE_CONNECTION_POOL"] = "1"  # else each write takes a port for minutes
    os.environ.pop("MC_TCP_PROTO", None)  # the first version of its protocol has no acknowledgment
    for name in ("MC_USE_TENT", "MC_USE_TEV1"):
        if name in os.environ:
            raise TransportError(
                f"{name} is set, but only Mooncake's classic transfer engine is supported; "
                "take it out of this worker's environment"
            )
    os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
    os.environ.setdefault("GLOG_minloglevel", "2")
    if protocol() == "tcp":
        os.environ["MC_FORCE_TCP"] = "1"  # else it takes every RDMA device that it finds
    else:
        os.environ.pop("MC_FORCE_TCP", None)
    try:
        import mooncake.engine
    except ModuleNotFoundError as error:
        raise TransportError(
            "Mooncake's transfer engine is not installed; "
            "install tandem-inference[mooncake], which needs Python 3.13 or older"
        ) from error
    except ImportError as error:
        raise TransportError(
            f"Mooncake's transfer engine can't be loaded: {error}; "
            "install what it lacks, for example libibverbs1 of Debian"
        ) from error
    _check(mooncake.engine)
    return mooncake.engine


@functools.cache
def _check(module: Any) -> None:
    for name in _PACKAGES:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        parts = tuple(int(part) for part in version.split(".")[:3] if part.isdecimal())
        if parts < NEEDED:
            needed = ".".join(map(str, NEEDED))
            raise TransportError(f"{name} is {version}; install {needed} or newer")
    if protocol() == "rdma":
        places = json.loads(module.TransferEngine().get_local_topology(_devices()))
        if not any(devices for lists in places.values() for devices in lists):
            raise TransportError(
                "MOONCAKE_PROTOCOL is rdma, and Mooncake's transfer engine finds no RDMA device; "
                "give this worker one, or set MOONCAKE_PROTOCOL to tcp"
            )


class Engine:
    """One engine: its two listening ports, its threads, what is registered with it.

    Every method but `write` and `reach` returns at once.
    """

    def __init__(self, host: str) -> None:
        """`host` is the address by which peers reach this worker. Raises TransportError."""
        module = load()
        self.protocol = protocol()
        if ":" in host:
            os.environ["MC_USE_IPV6"] = "1"
        self._engine = module.TransferEngine()
        # Never destroyed, also not at the end of the process.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._engine))
        try:
            failure = self._engine.initialize(host, "P2PHANDSHAKE", self.protocol, _devices())
        except RuntimeError as error:  # what C++ has thrown
            failure = error
        if failure:
            raise TransportError(
                f"Mooncake's transfer engine could not start at {host} (error {failure}); "
                "see this worker's log"
            )
        self.host = host
        self.identity = secrets.token_hex(8)
        named = f"[{host}]" if ":" in host else host
        self.name = f"{named}:{self._engine.get_rpc_port()}"
        self._peers: dict[str, str] = {}

    def suits(self, host: str, peer: str, identity: str) -> bool:
        """Whether it is at `host`, and knows no other peer by that name."""
        return self.host == host and self._peers.get(peer, identity) == identity

    def meet(self, peer: str, identity: str) -> None:
        """Note whom it knows by that name."""
        self._peers[peer] = identity

    def register(self, region: MemoryRegion) -> int:
        """Let peers read and write this memory. Raises TransportError."""
        failure = self._engine.register_memory(region.address, region.num_bytes)
        if failure:
            raise TransportError(
                f"Mooncake's transfer engine can't register {region.num_bytes} bytes "
                f"(error {failure}); "
                "see this worker's log, and the limit of locked memory if it uses RDMA"
            )
        return region.address

    def unregister(self, registration: object) -> None:
        """Refuse writes that begin from now on."""
        self._engine.unregister_memory(registration)

    def reach(self, peer: str, source: int, target: int, stopped: threading.Event) -> None:
        """Open the peer's segment and write a few bytes to it: may take 65 s. Raises OSError."""
        failure = self._engine.send_probe(peer)
        if failure:
            raise OSError(f"{peer} does not answer (error {failure})")
        self.write(peer, source, target, _GREETING_BYTES, stopped)

    def write(
        self, peer: str, source: int, target: int, num_bytes: int, stopped: threading.Event
    ) -> None:
        """Return when the bytes are in the peer's memory.

        Raises OSError when they are not, and soon after `stopped` is set: the library may go on
        with the write then.
        """
        number = self._engine.transfer_submit_write(peer, source, target, num_bytes)
        if not number:
            raise OSError(f"{peer} could not be reached")
        seconds = _FIRST_POLL_SECONDS
        while not (status := self._engine.transfer_check_status(number)):
            if stopped.wait(seconds):
                raise OSError("the session has ended")
            seconds = min(_LAST_POLL_SECONDS, 2 * seconds)
        if status < 0:
            raise OSError(f"{peer} refused the write or was lost in it; see this worker's log")


def borrow(host: str, peer: str = "", identity: str = "") -> Engine:
    """An engine for one session at `host`, with that peer. Raises TransportError."""
    mapped = getattr(ipaddress.ip_address(host), "ipv4_mapped", None)
    host = str(mapped or host)
    with _lock:
        for engine in _free:
            if engine.suits(host, peer, identity):
                _free.remove(engine)
                break
        else:
            engine = Engine(host)
    if peer:
        engine.meet(peer, identity)
    return engine


def give_back(engine: Engine) -> None:
    """Leave it to another session. No thread is inside it, and nothing is registered with it."""
    with _lock:
        _free.append(engine)


# A child has the engines' memory, but not their threads.
os.register_at_fork(after_in_child=_free.clear)
