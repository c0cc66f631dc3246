"""Moves KV of random tokens from a prefill worker, to prove that it can be moved."""

import random

from tandem_engine.cache.ledger import BlockLedger, Holding
from tandem_engine.core.messages import ProbeRequest, ProbeResult
from tandem_engine.kv_transfer.events import FetchDone, FetchFailed
from tandem_engine.kv_transfer.events import FetchRequest as Fetch
from tandem_engine.scheduler.limits import Limits
from tandem_wire.messages import PrefillPeer, SamplingParams


class Prober:
    """Open probes by the rid under which the hand-off knows them."""

    def __init__(self, ledger: BlockLedger, limits: Limits) -> None:
        self._ledger = ledger
        self._limits = limits
        self._open: dict[str, tuple[int, Holding]] = {}

    def __len__(self) -> int:
        return len(self._open)

    def start(self, request: ProbeRequest) -> Fetch | ProbeResult:
        """The fetch that the probe needs, or at once its failed result."""
        limits = self._limits
        longest = min(limits.num_blocks, (limits.max_model_len - 1) // limits.page_size)
        if not 0 < request.num_blocks <= longest:
            return ProbeResult(number=request.number, error=f"num_blocks must be 1 to {longest}")
        holding = self._ledger.open()
        if not self._ledger.allocate(holding, request.num_blocks):
            self._ledger.close(holding)
            return ProbeResult(number=request.number, error="no free KV blocks on this worker now")
        holding.leased = True
        rid = f"probe-{request.number}-{random.getrandbits(48):012x}"
        self._open[rid] = request.number, holding
        # Random ids, so that no prefix cache can stand in for the transfer; ids below 100 are
        # special tokens in many vocabularies and are left out where there are others.
        low = 100 if limits.vocab_size > 200 else 0
        num_tokens = request.num_blocks * limits.page_size
        tokens = tuple(random.randrange(low, limits.vocab_size) for _ in range(num_tokens))
        return Fetch(
            rid=rid,
            tokens=tokens,
            num_prompt_tokens=num_tokens,
            num_skip_tokens=0,
            blocks=tuple(holding.blocks),
            params=SamplingParams(max_tokens=1, temperature=0.0),
            peers=(PrefillPeer("", request.host, request.port),),
        )

    def finish(self, event: FetchDone | FetchFailed) -> ProbeResult | None:
        """The result, when `event` belongs to a probe."""
        probe = self._open.pop(event.rid, None)
        if probe is None:
            return None
        number, holding = probe
        holding.leased = False
        self._ledger.close(holding)
        if isinstance(event, FetchFailed):
            return ProbeResult(number=number, error=event.message)
        return ProbeResult(
            number=number,
            transport=event.transport,
            num_bytes=event.num_bytes,
            seconds=event.seconds,
        )
