"""The mock runner: tokens from a hash, time from a latency model, KV checked at every use."""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Final

from tandem_engine.config import WorkerConfig
from tandem_engine.errors import CorruptKVError
from tandem_engine.mock.kv import MockKV
from tandem_engine.mock.latency import MockProfile, parse_profile
from tandem_engine.step import Batch, BatchItem, Runner, SampledTokens, ScoredRows
from tandem_wire.messages import SamplingParams, TokenLogprobs

EOS_TOKEN: Final = 257
FIRST_PRINTABLE: Final = 32
NUM_PRINTABLE: Final = 95
MAX_REMEMBERED: Final = 8192
"""Sequences whose last prefix hash is kept; beyond that a sequence is verified from its start."""

_MASK: Final = 2**64 - 1
_MULTIPLIER: Final = 6364136223846793005
_INCREMENT: Final = 1442695040888963407
_START: Final = 0x9E3779B97F4A7C15


def extend_hash(state: int, tokens: Iterable[int]) -> list[int]:
    """Rolling prefix hashes after each of `tokens` (a 64-bit linear congruential step each)."""
    hashes = []
    for token in tokens:
        state = _step(state, token)
        hashes.append(state)
    return hashes


def greedy_answer(prompt: Iterable[int], num_tokens: int) -> list[int]:
    """What every worker says to a prompt at temperature 0, whoever computes which part of it."""
    state, params = _START, SamplingParams(max_tokens=num_tokens, temperature=0.0)
    for token in prompt:
        state = _step(state, token)
    answer: list[int] = []
    for position in range(num_tokens):
        answer.append(next_token(state, params, position))
        state = _step(state, answer[-1])
    return answer


def _step(state: int, token: int) -> int:
    return ((state ^ token) * _MULTIPLIER + _INCREMENT) & _MASK


def next_token(prefix_hash: int, params: SamplingParams, position: int, eos: int = 0) -> int:
    """The token that follows a prefix, printable ASCII and equal on every worker.

    Output position and seed matter only when sampling isn't greedy. With `eos` 0 there is never an
    end.
    """
    value = prefix_hash
    if params.temperature > 0:
        value = extend_hash(value, (params.seed & _MASK, position))[-1]
    value ^= value >> 29
    if eos and not params.ignore_eos and position >= params.min_tokens and (value >> 7) % eos == 0:
        return EOS_TOKEN
    return FIRST_PRINTABLE + (value >> 33) % NUM_PRINTABLE


class MockRunner(Runner):
    """Runs batches by hashing; each step sleeps for as long as the profile says.

    A sequence's pages are compared with the hashes of all its tokens the first time this runner
    sees it at a position it did not compute itself (cache hit, hand-off, recompute), and the newest
    cell and the first cell of its page at every decode. CorruptKVError says what is wrong.
    A rid stands for one sequence: a runner never sees it again with other tokens.
    """

    def __init__(
        self,
        profile: MockProfile,
        *,
        page_size: int,
        max_model_len: int = 0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.profile = profile
        self.vocab_size = profile.vocab
        self.eos_token_ids = (EOS_TOKEN,)
        self.max_model_len = min(profile.max_len, max_model_len or profile.max_len)
        self.num_blocks = profile.blocks
        self.kv = MockKV(
            num_blocks=profile.blocks,
            page_size=page_size,
            num_layers=profile.layers,
            window=profile.window,
        )
        self._kv = self.kv
        self._page_size = page_size
        self._sleep = sleep
        # rid -> (number of hashed tokens, hash after them, hash of the first token of that page)
        self._seen: OrderedDict[str, tuple[int, int, int]] = OrderedDict()

    def execute(self, batch: Batch) -> list[SampledTokens | None]:
        started = time.monotonic()
        for source, destination in batch.copies:
            self._kv.copy(source, destination)
        decodes: list[int] = []
        chunks: list[tuple[int, int]] = []
        known = self._advance_known_decodes(batch.items)
        results: list[SampledTokens | None] = []
        for item in batch.items:
            state = known.get(item.rid)
            if state is None:
                state = self._advance(item)
            if len(item.tokens) == 1:
                decodes.append(item.end)
            else:
                chunks.append((item.start, item.end))
            results.append(self._sample(item, state) if item.sample else None)
        for rows in batch.scored:
            result = results[rows.item] or SampledTokens([])
            result.prompt_logprobs = _score(batch.items[rows.item], rows)
            results[rows.item] = result
        rest = self.profile.step_seconds(decodes, chunks) - (time.monotonic() - started)
        if rest > 0:
            self._sleep(rest)
        return results

    def close(self) -> None:
        return None

    def _advance_known_decodes(self, items: list[BatchItem]) -> dict[str, int]:
        """Check and extend, all at once, every sequence that goes on by one token; hash by rid."""
        page, seen = self._page_size, self._seen
        states: dict[str, int] = {}
        rids: list[str] = []
        checked: list[int] = []
        expected: list[int] = []
        written: list[int] = []
        for item in items:
            start = item.start
            entry = seen.get(item.rid)
            if entry is None or entry[0] != start or start == 0 or len(item.tokens) != 1:
                continue
            _, state, page_state = entry
            table, newest = item.block_table, start - 1
            block = table[newest // page] * page
            checked += (block + newest % page, block)
            expected += (state, page_state)
            rids.append(item.rid)
            state = _step(state, item.tokens[0])
            written.append(table[start // page] * page + start % page)
            states[item.rid] = state
            seen[item.rid] = (start + 1, state, page_state if start % page else state)
        for index in self._kv.wrong_cells(checked, expected) if checked else ():
            place = f"block {checked[index] // page} at offset {checked[index] % page}"
            raise CorruptKVError(f"request {rids[index // 2]}: {place} lost the KV of its token")
        if written:
            self._kv.write_cells(written, list(states.values()))
        return states

    def _advance(self, item: BatchItem) -> int:
        """Check the pages before `item`, write its own, return the hash after its last token."""
        page = self._page_size
        count, state, page_state = self._seen.pop(item.rid, (-1, 0, 0))
        if item.start == 0:
            state, page_state = _START, 0
        elif count != item.start:
            prefix = extend_hash(_START, _prefix(item))
            self._kv.verify(item.rid, item.block_table, 0, prefix)
            state, page_state = prefix[-1], prefix[(item.start - 1) // page * page]
        else:
            self._kv.verify(item.rid, item.block_table, item.start - 1, [state])
        hashes = extend_hash(state, item.tokens)
        self._kv.write(item.block_table, item.start, hashes)
        first = (item.end - 1) // page * page
        if first >= item.start:
            page_state = hashes[first - item.start]
        self._seen[item.rid] = (item.end, hashes[-1], page_state)
        if len(self._seen) > MAX_REMEMBERED:
            self._seen.popitem(last=False)
        return hashes[-1]

    def _sample(self, item: BatchItem, state: int) -> SampledTokens:
        params = item.params
        token = next_token(state, params, len(item.output_tokens), self.profile.eos)
        if params.logprobs is None:
            return SampledTokens([token])
        others = [FIRST_PRINTABLE + (token + i) % NUM_PRINTABLE for i in range(1, params.logprobs)]
        ids = [token, *others][: params.logprobs]
        values = [-0.125 * (rank + 1) for rank in range(len(ids))]
        return SampledTokens([token], [TokenLogprobs(-0.125, ids, values)])


def _score(item: BatchItem, rows: ScoredRows) -> list[TokenLogprobs]:
    """Made-up logprobs of the tokens that follow these: the larger the id, the less likely."""
    count = item.params.prompt_logprobs or 0
    scores = []
    for place in range(item.start + rows.first, item.start + rows.end):
        token = item.prompt_tokens[place + 1]
        ids = list(range(count))
        scores.append(TokenLogprobs(-token / 64 - 1.0, ids, [-other / 64 - 1.0 for other in ids]))
    return scores


def _prefix(item: BatchItem) -> list[int]:
    """Tokens at positions [0, start)."""
    tokens = list(item.prompt_tokens[: item.start])
    return tokens + list(item.output_tokens[: item.start - len(tokens)])


def load_mock_runner(config: WorkerConfig) -> MockRunner:
    """The runner that `--mock PROFILE` asks for. Raises ConfigError."""
    return MockRunner(
        parse_profile(config.mock_profile),
        page_size=config.page_size,
        max_model_len=config.max_model_len,
    )
