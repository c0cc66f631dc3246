"""The transport probe: pattern pages over the real path, no block touched."""

from contextlib import ExitStack
from pathlib import Path

import msgspec
import numpy as np
import pytest

from tandem_engine.frames import ProbeRequest, ProbeResult
from tandem_engine.handoff.tests.scripted import LAYOUT, MOONCAKE, make


@pytest.mark.parametrize("transport", ["tcp", "shm", "cudaIpc", "nixl", MOONCAKE])
def test_probe_touches_no_block(stack: ExitStack, tmp_path: Path, transport: str) -> None:
    options = {"transport": transport, "shm_dir": str(tmp_path)}
    p, d = make(stack, "p", **options), make(stack, "d", **options)
    before = d.kv.data.copy(), p.kv.data.copy()
    request = ProbeRequest(
        number=7, host="127.0.0.1", port=p.handoff.bootstrap_port, num_blocks=500
    )
    d.handoff.post(request)
    result = d.wait(ProbeResult)
    assert (result.number, result.transport, result.error) == (7, transport, "")
    assert result.num_bytes == 500 * LAYOUT.block_bytes
    assert result.seconds > 0
    assert np.array_equal(d.kv.data, before[0])
    assert np.array_equal(p.kv.data, before[1])
    d.handoff.post(msgspec.structs.replace(request, number=8, num_blocks=10**9))
    assert "invalid" in d.wait(ProbeResult).error
    p.close()
    d.handoff.post(msgspec.structs.replace(request, number=9))
    assert d.wait(ProbeResult).error
