"""The transports that are built, and which of them two workers use with each other."""

import logging
from typing import Final

from tandem_engine.handoff.errors import HandoffUnavailable, PairingRefused, TransportError
from tandem_engine.handoff.settings import HandoffSettings
from tandem_engine.handoff.transports.base import Inbound, Link, Outbound, Transport
from tandem_engine.handoff.transports.cuda_ipc import CudaIpcTransport
from tandem_engine.handoff.transports.shm import ShmTransport
from tandem_engine.handoff.transports.tcp import TcpTransport
from tandem_engine.step import KVStore
from tandem_wire.handoff import TRANSPORT_CHOICES, TransportName, TransportOffer

log = logging.getLogger(__name__)

BUILT: Final[tuple[type[Transport], ...]] = (CudaIpcTransport, ShmTransport, TcpTransport)
"""Best first: `--transfer Auto` takes the first one that both sides can do."""


class Transports:
    """The transports that one worker may use, best first; made at its start, closed at its end."""

    def __init__(self, settings: HandoffSettings, kv: KVStore) -> None:
        """Raises HandoffUnavailable when `--transfer` names a transport that can't work here."""
        wanted = settings.transport
        chosen = [transport for transport in BUILT if wanted in ("auto", transport.name)]
        if not chosen:
            built = ", ".join(TRANSPORT_CHOICES[transport.name] for transport in BUILT)
            raise HandoffUnavailable(
                f"--transfer is {TRANSPORT_CHOICES.get(wanted, wanted)}, "
                f"which is not built in; use one of Auto, {built}"
            )
        self._usable: dict[TransportName, Transport] = {}
        self._missing: dict[TransportName, str] = {}
        for kind in chosen:
            try:
                self._usable[kind.name] = kind(settings, kv)
            except TransportError as error:
                self._missing[kind.name] = str(error)
        if wanted != "auto" and self._missing:
            raise HandoffUnavailable(
                f"--transfer is {TRANSPORT_CHOICES[wanted]}, but {self._missing[wanted]}"
            )

    def __str__(self) -> str:
        return ", ".join(
            f"{transport.name} ({transport.placement}, {transport.memory} memory)"
            for transport in self._usable.values()
        )

    def offer(self, link: Link) -> dict[TransportName, Inbound]:
        """D's ends, best first, whose offers go into the handshake.

        Raises:
            TransportError: there is none, for these reasons.
        """
        inbounds: dict[TransportName, Inbound] = {}
        why = []
        for transport in self._usable.values():
            try:
                inbounds[transport.name] = transport.offer(link)
            except TransportError as error:
                log.warning("can't offer the transport %s: %s", transport.name, error)
                why.append(f"{transport.name}: {error}")
        if not inbounds:
            raise TransportError(f"this worker can offer no transport ({'; '.join(why)})")
        return inbounds

    async def accept(
        self, offers: list[TransportOffer], link: Link
    ) -> tuple[TransportOffer, Outbound]:
        """P's end for the first of D's offers that this worker can do too.

        Raises:
            PairingRefused: none of them.
        """
        why = []
        for offer in offers:
            transport = self._usable.get(offer.name)
            try:
                if transport is not None:
                    return offer, await transport.accept(offer, link)
                reason = self._missing.get(offer.name) or "not allowed by --transfer here"
            except TransportError as error:
                reason = str(error)
            why.append(f"{offer.name}: {reason}")
        raise PairingRefused(
            "no common transport" + (f" ({'; '.join(why)})" if why else ""),
            "start both workers with --transfer Auto, or with the same transport",
        )

    def close(self) -> None:
        """Give back what they hold; every session has ended."""
        for transport in self._usable.values():
            transport.close()
