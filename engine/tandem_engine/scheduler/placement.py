"""Gives blocks to requests: prefix reuse, copy-on-write, registration, release."""

from tandem_engine.cache.ledger import BlockLedger, Holding
from tandem_engine.cache.prefix_index import Entry, PrefixMatch
from tandem_engine.scheduler.request import Request
from tandem_wire.hashing import block_hash, prefix_hashes


class Placement:
    """The only writer of `Request.holding`, `hashes` and `num_registered`.

    Copies that it plans must run before anything else in the next batch; until `finish_copies` the
    blocks they read from are held.
    """

    def __init__(self, ledger: BlockLedger) -> None:
        self.ledger = ledger
        self._page_size = ledger.page_size
        self._copies: list[tuple[int, int]] = []
        self._copy_sources: list[Holding] = []

    def hash_prompt(self, request: Request) -> None:
        """Hash the full blocks of a new request, once."""
        request.hashes = prefix_hashes(request.tokens, self._page_size, request.salt)

    def match(self, request: Request, *, partial: bool) -> PrefixMatch:
        """The cached prefix of a request; at least one token is always left to compute."""
        limit = len(request.tokens) - 1
        return self.ledger.match(
            request.tokens, request.hashes, request.salt, limit, partial=partial
        )

    def missing_blocks(self, request: Request, match: PrefixMatch, watermark: int) -> int:
        """How many blocks short the ledger is of placing `request`; 0 or less: it fits."""
        num_blocks = -(-len(request.tokens) // self._page_size)
        needed = num_blocks - len(match.blocks)
        if match.num_partial:
            needed += 1  # the block to copy from must stay until the copy was made
        return needed + watermark - self.ledger.num_free_after(match)

    def place(self, request: Request, match: PrefixMatch) -> None:
        """Hold blocks for all tokens of `request`; `missing_blocks` must have been 0 or less."""
        ledger, page = self.ledger, self._page_size
        holding = ledger.open()
        request.holding = holding
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
        request.num_registered = len(match.blocks)
        request.num_computed = len(match.blocks) * page + match.num_partial

    def grow(self, request: Request) -> bool:
        """One more block for the next token; False when there is none."""
        assert request.holding is not None
        return self.ledger.allocate(request.holding, 1)

    def take_copies(self) -> list[tuple[int, int]]:
        """Copies for the batch that is being built."""
        copies, self._copies = self._copies, []
        return copies

    def finish_copies(self) -> None:
        """The batch with the copies has run."""
        for source in self._copy_sources:
            self.ledger.close(source)
        self._copy_sources.clear()

    def register(self, request: Request) -> None:
        """Index every block that has become full; costs nothing while none has."""
        page, blocks, hashes = self._page_size, request.blocks, request.hashes
        for number in range(request.num_registered, request.num_computed // page):
            tokens = tuple(request.tokens[number * page : (number + 1) * page])
            parent = hashes[number - 1] if number else request.salt
            if number == len(hashes):
                hashes.append(block_hash(parent, tokens))
            self.ledger.register(blocks[number], Entry(parent, hashes[number], tokens))
            request.num_registered = number + 1

    def release(self, request: Request) -> None:
        """Give all blocks back; what was computed stays cached, down to a partial last block."""
        holding = request.holding
        if holding is None:
            return
        holding.leased = False
        page, full = self._page_size, request.num_computed // self._page_size
        if request.num_computed % page and full == request.num_registered:
            parent = request.hashes[full - 1] if full else request.salt
            tokens = tuple(request.tokens[full * page : request.num_computed])
            self.ledger.register(holding.blocks[full], Entry(parent, None, tokens))
        self.ledger.close(holding)
        request.holding = None
        request.num_computed = 0
        request.num_registered = 0
        request.decode_items = []
