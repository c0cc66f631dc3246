"""One question to a prefill worker: ask for pages, receive them, check what came."""

from collections.abc import Iterator
from typing import Final

from tandem_engine.handoff.decode.session import Attempt, DecodeSession
from tandem_engine.handoff.errors import LinkFault, PeerUnavailable
from tandem_engine.handoff.events import Counters
from tandem_engine.handoff.pages import Pages, PatternPages, travelling_bytes
from tandem_engine.handoff.settings import HandoffSettings
from tandem_engine.handoff.transports.landing import Landing
from tandem_wire.errors import WireError
from tandem_wire.handoff import TRY_OUT_EPOCH, Commit, KVLayout, Prefill, Probe

_NUM_CHECKS: Final = 4
_CHECK_BLOCKS: Final = 16
_CHECK_BYTES: Final = 64 << 20


class Exchange:
    """How this worker asks and checks, on whatever session. Used on the loop."""

    def __init__(self, settings: HandoffSettings, layout: KVLayout, counters: Counters) -> None:
        self._settings = settings
        self._layout = layout
        self._counters = counters

    async def receive(
        self, session: DecodeSession, question: Prefill | Probe, attempt: Attempt, pages: Pages
    ) -> Commit:
        """Ask, receive, check. Raises AttemptFailed.

        On return, good or bad, nothing of the epoch can land any more.
        """
        blocks = question.blocks if isinstance(question, Prefill) else range(question.num_blocks)
        landing = Landing(
            pages, blocks, checksum=self._settings.checksum, on_progress=attempt.progress
        )
        session.begin(question.rid, question.epoch, landing, attempt)
        try:
            try:
                session.connection.send(question)
            except WireError as error:
                raise PeerUnavailable(str(error)) from error
            commit = await attempt.complete(self._settings.stall_seconds)
        finally:
            await session.end(question.rid, question.epoch)
        self._verify(commit, landing, self._num_bytes(question))
        return commit

    def _num_bytes(self, question: Prefill | Probe) -> int:
        layout = self._layout
        if isinstance(question, Probe):
            return question.num_blocks * layout.block_bytes
        first = question.num_skip_tokens // layout.page_size
        return travelling_bytes(layout, len(question.tokens), first)

    def _verify(self, commit: Commit, landing: Landing, num_bytes: int) -> None:
        if landing.error:
            raise LinkFault(landing.error)
        if not commit.num_bytes == landing.num_bytes == num_bytes:
            raise LinkFault(
                f"{landing.num_bytes} bytes landed, {commit.num_bytes} were committed, "
                f"{num_bytes} were asked for"
            )
        if self._settings.checksum and commit.checksum and commit.checksum != landing.checksum:
            self._counters.add("kv_checksum_errors_total")
            raise LinkFault("the KV that landed has another checksum than the one committed")

    async def check(self, session: DecodeSession, epochs: Iterator[int]) -> None:
        """Move a known pattern several times over a session that lost or changed bytes before.

        Raises AttemptFailed at the first one that doesn't arrive whole.
        """
        num_blocks = max(1, min(_CHECK_BLOCKS, _CHECK_BYTES // self._layout.block_bytes))
        for _ in range(_NUM_CHECKS):
            attempt = Attempt()
            attempt.expire_after(self._settings.stall_seconds)
            question = Probe(next(epochs), num_blocks)
            await self.receive(session, question, attempt, PatternPages(self._layout))

    async def try_out(self, session: DecodeSession) -> None:
        """Move one block of a known pattern over a new session. Raises AttemptFailed.

        A transport can shake hands well and still lose or change bytes: a mapping of the wrong
        memory, a device that can't reach another one.
        """
        attempt = Attempt()
        attempt.expire_after(self._settings.dial_seconds)
        question = Probe(TRY_OUT_EPOCH, num_blocks=1)
        await self.receive(session, question, attempt, PatternPages(self._layout))
