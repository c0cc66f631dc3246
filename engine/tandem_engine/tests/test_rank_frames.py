"""What passes between the first rank and the others: batches, and memory that they share."""

import random

import msgspec
import numpy as np

from tandem_engine.parallel.messages import RankStep
from tandem_engine.parallel.shared_file import SharedFile
from tandem_engine.parallel.step_codec import StepDecoder, StepEncoder
from tandem_engine.step import Batch, BatchItem
from tandem_wire.messages import SamplingParams

PARAMS = SamplingParams(max_tokens=9, temperature=0.7, seed=3)


def send(encoder: StepEncoder, batch: Batch) -> RankStep:
    return msgspec.msgpack.decode(msgspec.msgpack.encode(encoder.encode(batch)), type=RankStep)


def make_item(rid: str, table: list[int], tokens: list[int], previous: int = -1) -> BatchItem:
    return BatchItem(rid, tokens, 5, table, True, PARAMS, previous=previous)


def test_tables_that_grow_shrink_and_change_arrive_as_they_are() -> None:
    rng = random.Random(0)
    encoder, decoder = StepEncoder(), StepDecoder()
    tables = {f"r{number}": [number] for number in range(6)}
    for step in range(300):
        for rid, table in tables.items():
            what = rng.random()
            if what < 0.4:
                table.append(rng.randrange(1000))
            elif what < 0.5:
                tables[rid] = [rng.randrange(1000) for _ in range(rng.randrange(1, 9))]
            elif what < 0.55:
                del table[rng.randrange(1, len(table) + 1) :]
        chosen = rng.sample(sorted(tables), rng.randrange(7))
        items = [make_item(rid, tables[rid], [step, 7]) for rid in chosen]
        batch = decoder.decode(send(encoder, Batch(items, [(1, step)])))
        assert batch.copies == [(1, step)]
        assert [item.rid for item in batch.items] == chosen
        for found, item in zip(batch.items, items, strict=True):
            assert found.block_table == item.block_table
            assert (list(found.tokens), found.start, found.sample) == ([step, 7], 5, True)


def test_a_long_table_is_sent_once() -> None:
    encoder, decoder = StepEncoder(), StepDecoder()
    table = list(range(100))
    first = send(encoder, Batch([make_item("r", table, [1])]))
    table.append(7)
    second = send(encoder, Batch([make_item("r", table, [1], previous=0)]))
    assert (first.items[0].known, second.items[0].known) == (0, 100)
    assert list(second.items[0].blocks) == [7]
    one = decoder.decode(first).items[0].block_table
    two = decoder.decode(second).items[0]
    # The same object, so that the runner there sends its device only what was added.
    assert two.block_table is one
    assert (two.block_table, two.previous) == (table, 0)


def test_a_shared_file_grows_on_both_sides() -> None:
    ours = SharedFile()
    theirs = SharedFile(ours.descriptor)
    for size in (10, 5, 5000, 100):
        ours.first(size)[:] = np.arange(size) % 251
        assert np.array_equal(theirs.first(size), np.arange(size) % 251)
        theirs.first(size)[:] = 9
        assert (ours.first(size) == 9).all()
    ours.close()
