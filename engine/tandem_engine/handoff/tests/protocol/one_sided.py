"""A one-sided transport: the network puts P's bytes into D's cache, and D can't drop them.

A fence is safe by completion: P's lane has a result once a write has landed or never will. The end
of a session is safe by revocation: after `close` no write of P lands.
"""

from tandem_engine.handoff.pages import KVPages
from tandem_engine.handoff.tests.protocol.fabric import (
    Lane,
    ModelInbound,
    ModelOutbound,
    ModelTransport,
    Post,
    read,
)
from tandem_engine.handoff.transports.base import Inbound, Link, Outbound, PageWrite, Written
from tandem_wire.handoff import HandoffMessage, PagesWritten, TransportOffer


class OneSidedInbound(ModelInbound):
    """D's end: the whole cache is P's to write to, until the session is closed."""

    def handle(self, message: HandoffMessage) -> None:
        if isinstance(message, PagesWritten):
            layers = range(message.first_layer, message.first_layer + message.num_layers)
            self._placed(message.epoch, message.blocks, layers)

    def land(self, post: Post) -> None:
        """The network makes a write, or finds that it has lost the right to."""
        fabric, arrival, write = self.fabric, post.arrival, post.arrival.write
        fabric.posted.remove(post)
        post.is_done = True
        if self.is_closed:
            post.failure = OSError("the peer has taken its memory back")
            return
        post.payload = read(write)
        arrives = memoryview(fabric.carry(post.payload))
        fabric.on_landing(arrival)
        if arrival.touches_cache:  # a probe's pages have room of their own
            KVPages(self.kv).take(write.target_blocks, write.layers, arrives)

    async def close(self) -> None:
        self.is_closed = True


class OneSidedOutbound(ModelOutbound):
    """P's end: posts writes to the network and says when they have landed."""

    inbound: OneSidedInbound

    def begin(self, lane: Lane, write: PageWrite) -> None:
        lane.post = Post(self.arrival(write), self.inbound.land)
        failure = self.fabric.take_failure()
        if self.is_interrupted:
            failure = OSError("the session has ended")
        if failure is not None:
            lane.post.is_done, lane.post.failure = True, failure
        else:
            self.fabric.posted.append(lane.post)

    def can_send(self, lane: Lane) -> bool:
        return lane.post is not None and lane.post.is_done

    def send(self, lane: Lane, write: PageWrite) -> Written:
        post = lane.post
        assert post is not None
        if post.failure is not None:
            raise post.failure
        layers, blocks = write.layers, list(write.target_blocks)
        message = PagesWritten(write.epoch, 0, blocks, len(post.payload), layers.start, len(layers))
        self._loop.call_soon_threadsafe(self.link.send, message)
        return self.result(write, post.payload)

    def _interrupt(self) -> None:
        """What is posted and has not landed never will."""
        super()._interrupt()
        for lane in self.seat.lanes:
            if lane.outbound is self and lane.post is not None and not lane.post.is_done:
                self.fabric.posted.remove(lane.post)
                lane.post.is_done, lane.post.failure = True, OSError("the session has ended")


class OneSidedTransport(ModelTransport):
    """P writes D's memory; a fence is safe by completion, the end of a session by revocation."""

    name = "mooncake"
    placement = "one-sided"

    def offer(self, link: Link) -> Inbound:
        return OneSidedInbound(self, link)

    async def accept(self, offer: TransportOffer, link: Link) -> Outbound:
        inbound = self.fabric.inbounds[str(offer.details["key"])]
        assert isinstance(inbound, OneSidedInbound)
        return OneSidedOutbound(self, inbound, link)
