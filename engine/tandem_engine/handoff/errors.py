"""What can go wrong in a hand-off.

HandoffError
├── HandoffUnavailable   the hand-off can't start (port taken, no such transport)
├── PairingRefused       the handshake failed: layout, hash, protocol or transport differ
├── TransportError       a transport can't make its end, or failed while it moved pages
└── AttemptFailed        one attempt at one peer failed; the next one may succeed
    ├── PeerUnavailable  no connection to it now
    ├── LinkFault        pages came damaged or not at all: counts against the pair of workers
    └── FetchStopped     the request was cancelled here
"""


class HandoffError(Exception):
    """Base of everything that the hand-off raises."""


class HandoffUnavailable(HandoffError):
    """The hand-off can't start; the message says why and what to do."""


class PairingRefused(HandoffError):
    """These two workers must not exchange KV."""

    def __init__(self, error: str, remedy: str) -> None:
        super().__init__(f"{error} ({remedy})" if remedy else error)
        self.error = error
        self.remedy = remedy


class TransportError(HandoffError):
    """A transport can't make its end of a session, or failed while it moved pages."""


class AttemptFailed(HandoffError):
    """One attempt at one peer failed."""


class PeerUnavailable(AttemptFailed):
    """There is no connection to the peer now."""


class LinkFault(AttemptFailed):
    """Pages came damaged, or never came although the peer has sent them or tried to."""


class FetchStopped(AttemptFailed):
    """The request was cancelled here."""
