"""What can go wrong on a framed connection.

WireError
├── DialFailed        no connection came about (refused, unreachable, timed out)
├── ConnectionLost    the connection ended while somebody still needed it
│   └── PeerSilent    nothing came for several heartbeats; the peer counts as gone
│   └── SlowPeer      the peer does not read and our buffer for it is full
└── ProtocolError     the bytes make no sense; the connection is closed
    ├── FrameTooLarge a frame beyond the limit, here or from there
    └── MalformedFrame not MessagePack of a known message, or cut off
"""


class WireError(Exception):
    """Base of everything that a framed connection raises."""


class DialFailed(WireError):
    """No connection came about."""


class ConnectionLost(WireError):
    """The connection ended while somebody still needed it."""


class PeerSilent(ConnectionLost):
    """Nothing came for several heartbeats; the peer counts as gone."""


class SlowPeer(ConnectionLost):
    """The peer does not read, and the bytes that wait for it reached the limit."""


class ProtocolError(WireError):
    """The bytes make no sense; the connection is closed."""


class FrameTooLarge(ProtocolError):
    """A frame beyond the size limit, here or from there."""


class MalformedFrame(ProtocolError):
    """Not MessagePack of a known message, or cut off in the middle."""
