"""The hand-off between two services in one process: what arrives, and what may not."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from tandem_engine.kv_transfer.events import FetchDone, PushDone
from tandem_engine.kv_transfer.tests.scripted import Worker


@pytest.fixture(name="stack")
def stack_fixture() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def make(stack: ExitStack, name: str, **changes: object) -> Worker:
    worker = Worker(name, **changes)  # type: ignore[arg-type]
    stack.callback(worker.close)
    return worker


@pytest.mark.parametrize("transport", ["tcp", "shm"])
@pytest.mark.parametrize("checksum", [True, False])
def test_pages_arrive(stack: ExitStack, tmp_path: Path, transport: str, checksum: bool) -> None:
    options = {"transfer": transport, "shm_dir": str(tmp_path), "checksum": checksum}
    p, d = make(stack, "p", **options), make(stack, "d", **options)
    before = d.kv.data.copy()
    for number, (tokens, skip) in enumerate([(10, 0), (1, 0), (90, 8), (8, 4)]):
        d.fetch(f"r{number}", [p], tokens, skip)
        arrived = p.arrived()
        source = p.push(arrived, chunks=3)
        done = d.outcome(f"r{number}")
        assert isinstance(done, FetchDone), done
        assert (done.first_token, done.worker_id) == (77, "p")
        assert done.num_bytes == len(source) * p.kv.layout.block_bytes
        target = arrived.request.blocks
        assert np.array_equal(d.kv.data[:, :, target], p.kv.data[:, :, source])
        before[:, :, target] = d.kv.data[:, :, target]
        p.wait(PushDone)
    assert np.array_equal(d.kv.data, before), "a block that nobody asked for was written"
    assert p.handoff.num_leases() == d.handoff.num_leases() == 0
    assert not list(tmp_path.iterdir())
