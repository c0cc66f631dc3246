"""The transports that are built, and which of them two workers use with each other."""

import logging
from typing import Final

from tandem_engine.handoff.errors import HandoffUnavailable, PairingRefused, TransportError
from tandem_engine.handoff.settings import HandoffSettings
from tandem_engine.handoff.transports.base import Inbound, Link, Outbound, Transport
from tandem_engine.handoff.transports.shm import ShmTransport
from tandem_engine.handoff.transports.tcp import TcpTransport
from tandem_wire.handoff import TRANSPORT_CHOICES, TransportName, TransportOffer

log = logging.getLogger(__name__)

BUILT: Final[tuple[Transport, ...]] = (ShmTransport(), TcpTransport())
"""Best first: `--transfer Auto` takes the first one that both sides can do."""


class Transports:
    """The transports that one worker may use, best first."""

    def __init__(self, settings: HandoffSettings) -> None:
        """Raises HandoffUnavailable when `--transfer` names a transport that can't work here."""
        wanted = settings.transport
        chosen = [transport for transport in BUILT if wanted in ("auto", transport.name)]
        if not chosen:
            built = ", ".join(TRANSPORT_CHOICES[transport.name] for transport in BUILT)
            raise HandoffUnavailable(
                f"--transfer is {TRANSPORT_CHOICES.get(wanted, wanted)}, "
                f"which is not built in; use one of Auto, {built}"
            )
        self._missing = {transport.name: transport.missing(settings) for transport in chosen}
        if wanted != "auto" and self._missing[wanted]:
            raise HandoffUnavailable(
                f"--transfer is {TRANSPORT_CHOICES[wanted]}, but {self._missing[wanted]}"
            )
        self._usable = {
            transport.name: transport for transport in chosen if not self._missing[transport.name]
        }

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

    def accept(self, offers: list[TransportOffer], link: Link) -> tuple[TransportOffer, Outbound]:
        """P's end for the first of D's offers that this worker can do too.

        Raises:
            PairingRefused: none of them.
        """
        why = []
        for offer in offers:
            transport = self._usable.get(offer.name)
            try:
                if transport is not None:
                    return offer, transport.accept(offer, link)
                reason = self._missing.get(offer.name) or "not allowed by --transfer here"
            except TransportError as error:
                reason = str(error)
            why.append(f"{offer.name}: {reason}")
        raise PairingRefused(
            "no common transport" + (f" ({'; '.join(why)})" if why else ""),
            "start both workers with --transfer Auto, or with the same transport",
        )
