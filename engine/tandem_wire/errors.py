"""What can go wrong on a framed connection.

WireError
├── DialFailed          the connection could not be opened (refused, unreachable, timed out)
├── ConnectionLost      the connection ended while it was still needed
│   ├── PeerSilent      nothing came for several heartbeats; the peer counts as gone
│   └── SlowPeer        the peer does not read, and our buffer for it is full
└── ProtocolError       the bytes make no sense; the connection is closed
    ├── FrameTooLarge   a frame beyond the limit, to the peer or from it
    └── MalformedFrame  not MessagePack of a known message, or cut off
"""


class WireError(Exception):
    """Base of everything that a framed connection raises."""


class DialFailed(WireError):
    """The connection could not be opened."""


class ConnectionLost(WireError):
    """The connection ended while it was still needed."""


class PeerSilent(ConnectionLost):
    """Nothing came for several heartbeats; the peer counts as gone."""


class SlowPeer(ConnectionLost):
    """The peer does not read, and as many bytes as the limit allows wait for it."""


class ProtocolError(WireError):
    """The bytes make no sense; the connection is closed."""


class FrameTooLarge(ProtocolError):
    """A frame beyond the size limit, to the peer or from it."""


class MalformedFrame(ProtocolError):
    """Not MessagePack of a known message, or cut off in the middle."""
