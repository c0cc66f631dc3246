"""The transports that are built, and which of them two workers use with each other."""

import itertools
import logging
from typing import Final, Literal

from tandem_engine.handoff.errors import HandoffUnavailable, PairingRefused, TransportError
from tandem_engine.handoff.settings import HandoffSettings
from tandem_engine.handoff.transports.base import Inbound, Link, Outbound, Transport
from tandem_engine.handoff.transports.cuda_ipc import CudaIpcTransport
from tandem_engine.handoff.transports.cuda_ipc_ring import CudaIpcRingTransport
from tandem_engine.handoff.transports.mooncake import MooncakeTransport
from tandem_engine.handoff.transports.nixl import NixlTransport
from tandem_engine.handoff.transports.shm import ShmTransport
from tandem_engine.handoff.transports.tcp import TcpTransport
from tandem_engine.step import KVStore
from tandem_wire.handoff import TRANSPORT_CHOICES, TransportName, TransportOffer

log = logging.getLogger(__name__)

BUILT: Final[tuple[type[Transport], ...]] = (
    CudaIpcTransport,
    CudaIpcRingTransport,
    ShmTransport,
    NixlTransport,
    TcpTransport,
    MooncakeTransport,
)
"""Best first: `--transfer Auto` takes the first one that both sides can do, of those that are
automatic. mooncake is not: over TCP it is slower than tcp, see docs/benchmarks/."""


Reasons = dict[TransportName, str]
"""Why a transport is not used, by its name."""


def _is_wanted(name: TransportName, wanted: TransportName | Literal["auto"]) -> bool:
    """Whether it was named, or stands in for the one that was named."""
    return name == wanted or (name, wanted) == ("cudaIpcRing", "cudaIpc")


def _list(why: Reasons) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in why.items())


def better_ones(why: Reasons, chosen: TransportName) -> Reasons:
    """Those of `why` that `Auto` would have taken rather than `chosen`, best first."""
    better = itertools.takewhile(lambda name: name != chosen, (kind.name for kind in BUILT))
    return {name: why[name] for name in better if name in why}


class Transports:
    """The transports that one worker may use, best first; made at its start, closed at its end."""

    def __init__(self, settings: HandoffSettings, kv: KVStore) -> None:
        """Raises HandoffUnavailable when `--transfer` names a transport that can't work here."""
        wanted = settings.transport
        chosen = [
            kind
            for kind in BUILT
            if _is_wanted(kind.name, wanted) or (wanted == "auto" and kind.is_automatic)
        ]
        if not chosen:
            built = ", ".join(dict.fromkeys(TRANSPORT_CHOICES[kind.name] for kind in BUILT))
            raise HandoffUnavailable(
                f"--transfer is {TRANSPORT_CHOICES.get(wanted, wanted)}, "
                f"which is not built in; use one of Auto, {built}"
            )
        self._usable: dict[TransportName, Transport] = {}
        self._missing: dict[TransportName, str] = {}
        for kind in chosen:
            try:
                if kind.name in settings.ruled_out:
                    raise TransportError(settings.ruled_out[kind.name])
                self._usable[kind.name] = kind(settings, kv)
            except TransportError as error:
                self._missing[kind.name] = str(error)
        if not self._usable:
            why = "; ".join(dict.fromkeys(self._missing.values()))
            raise HandoffUnavailable(f"--transfer is {TRANSPORT_CHOICES[wanted]}, but {why}")

    def __str__(self) -> str:
        return ", ".join(
            f"{transport.name} ({transport.placement}, {transport.memory} memory)"
            for transport in self._usable.values()
        )

    def offer(self, link: Link, failed: Reasons) -> tuple[dict[TransportName, Inbound], Reasons]:
        """D's ends, best first, whose offers go into the handshake; and why others don't.

        Args:
            failed: the transports that were tried with this peer in vain, and how they failed.

        Raises:
            TransportError: there is none, for these reasons.
        """
        inbounds: dict[TransportName, Inbound] = {}
        why = self._missing | failed
        for transport in self._usable.values():
            if transport.name in failed:
                continue
            try:
                inbounds[transport.name] = transport.offer(link)
            except TransportError as error:
                log.warning("can't offer the transport %s: %s", transport.name, error)
                why[transport.name] = str(error)
        if not inbounds:
            raise TransportError(f"this worker can offer no transport ({_list(why)})")
        return inbounds, why

    async def accept(
        self, offers: list[TransportOffer], link: Link
    ) -> tuple[TransportOffer, Outbound, Reasons]:
        """P's end for the first of D's offers that this worker can do too; and why not for others.

        Raises:
            PairingRefused: none of them.
        """
        why: Reasons = {}
        for offer in offers:
            transport = self._usable.get(offer.name)
            try:
                if transport is not None:
                    return offer, await transport.accept(offer, link), why
                reason = self._missing.get(offer.name) or "not allowed by --transfer here"
            except TransportError as error:
                reason = str(error)
            why[offer.name] = reason
        raise PairingRefused(
            "no common transport" + (f" ({_list(why)})" if why else ""),
            "start both workers with --transfer Auto, or with the same transport",
        )

    def close(self) -> None:
        """Give back what they hold; every session has ended."""
        for transport in self._usable.values():
            transport.close()
