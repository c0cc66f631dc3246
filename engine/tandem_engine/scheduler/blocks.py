"""The blocks of each request: prefix reuse, copy-on-write, registration, release."""

from tandem_engine.cache.ledger import BlockLedger, Holding
from tandem_engine.cache.prefix_index import Entry, PrefixMatch
from tandem_engine.scheduler.request import Request
from tandem_engine.window import first_kept, first_seen
from tandem_wire.hashing import block_hash, prefix_hashes


class RequestBlocks:
    """Gives blocks to requests and takes them back.

    The only writer of `Request.holding`, `blocks`, `hashes`, `num_registered` and `first_whole`.
    The copies that it plans must run before anything else in the next batch; until `finish_copies`
    it holds the blocks that they read from.
    """

    def __init__(self, ledger: BlockLedger) -> None:
        self.page_size = ledger.page_size
        self._ledger = ledger
        self._copies: list[tuple[int, int]] = []
        self._copy_sources: list[Holding] = []

    def hash_prompt(self, request: Request) -> None:
        """Hash the full blocks of a new request, once."""
        request.hashes = prefix_hashes(request.tokens, self.page_size, request.salt)

    def match(self, request: Request, *, partial: bool) -> PrefixMatch:
        """The cached prefix of a request; at least one token is always left to compute.

        Logprobs of the prompt come from computing it, so a request for them finds nothing.
        """
        if request.wants_scores:
            return PrefixMatch([])
        limit = len(request.tokens) - 1
        return self._ledger.match(
            request.tokens, request.hashes, request.salt, limit, partial=partial
        )

    def match_for_fetch(self, request: Request, match: PrefixMatch) -> PrefixMatch:
        """The full blocks that a hand-off may leave out, where computing could go on from `match`.

        They may be more: what the layers with a window need comes by the hand-off, if it reaches
        far enough back.
        """
        ledger = self._ledger
        if not ledger.window:
            return PrefixMatch(match.blocks)
        num_tokens = len(request.tokens)
        kept = first_kept(num_tokens, ledger.window, self.page_size)
        return ledger.match(
            request.tokens,
            request.hashes,
            request.salt,
            num_tokens - 1,
            partial=False,
            first_whole=kept,
        )

    def can_compute(self, request: Request) -> bool:
        """Whether the blocks before the first uncomputed token have all layers that it sees."""
        ledger, page = self._ledger, self.page_size
        seen = first_seen(request.num_computed, ledger.window, page)
        held = request.blocks[seen : request.num_computed // page]
        return not ledger.window or all(map(ledger.index.is_whole, held))

    def complete(self, request: Request) -> None:
        """A hand-off has filled the blocks of a request: index them."""
        request.num_computed = num_tokens = len(request.tokens)
        request.first_whole = first_kept(num_tokens, self._ledger.window, self.page_size)
        self.register(request)

    def missing(self, request: Request, match: PrefixMatch, watermark: int) -> int:
        """How many blocks are missing to place `request` and leave `watermark`; 0 or less: none."""
        num_blocks = -(-len(request.tokens) // self.page_size)
        needed = num_blocks - len(match.blocks)
        if match.num_partial:
            needed += 1  # the block to copy from must stay until the copy is made
        return needed + watermark - self._ledger.num_free_after(match)

    def place(self, request: Request, match: PrefixMatch) -> None:
        """Hold blocks for all tokens of `request`; `missing` must have been 0 or less."""
        ledger, page = self._ledger, self.page_size
        holding = ledger.open()
        request.holding, request.blocks = holding, holding.blocks
        for block in match.blocks:
            ledger.share(holding, block)
        if match.num_partial:
            source = ledger.open()
            ledger.share(source, match.partial_block)
            self._copy_sources.append(source)
        num_blocks = -(-len(request.tokens) // page)
        fits = ledger.allocate(holding, num_blocks - len(match.blocks))
        assert fits, "place was called without room"
        if match.num_partial:
            self._copies.append((match.partial_block, holding.blocks[len(match.blocks)]))
        request.num_registered, request.first_whole = len(match.blocks), 0
        request.num_computed = len(match.blocks) * page + match.num_partial

    def grow(self, request: Request) -> bool:
        """Add a block; False when none is left."""
        assert request.holding is not None
        return self._ledger.allocate(request.holding, 1)

    def take_copies(self) -> list[tuple[int, int]]:
        """Copies for the batch that is being built."""
        copies, self._copies = self._copies, []
        return copies

    def finish_copies(self) -> None:
        """The batch with the copies has run."""
        for source in self._copy_sources:
            self._ledger.close(source)
        self._copy_sources.clear()

    def register(self, request: Request) -> None:
        """Index every block that has become full."""
        page, blocks, hashes = self.page_size, request.blocks, request.hashes
        for number in range(request.num_registered, request.num_computed // page):
            tokens = tuple(request.tokens[number * page : (number + 1) * page])
            parent = hashes[number - 1] if number else request.salt
            if number == len(hashes):
                hashes.append(block_hash(parent, tokens))
            entry = Entry(parent, hashes[number], tokens, whole=number >= request.first_whole)
            self._ledger.register(blocks[number], entry)
            request.num_registered = number + 1

    def release(self, request: Request) -> None:
        """Give all blocks back. What was computed stays cached, even a partial last block."""
        holding = request.holding
        if holding is None:
            return
        holding.leased = False
        page, full = self.page_size, request.num_computed // self.page_size
        if request.num_computed % page and full == request.num_registered:
            parent = request.hashes[full - 1] if full else request.salt
            assert full >= request.first_whole, "the last block always has every layer"
            tokens = tuple(request.tokens[full * page : request.num_computed])
            self._ledger.register(holding.blocks[full], Entry(parent, None, tokens))
        self._ledger.close(holding)
        request.holding, request.blocks = None, []
        request.decode_item = request.spare_item = None  # they have the old block table
        request.num_computed = 0
        request.num_registered = request.first_whole = 0
