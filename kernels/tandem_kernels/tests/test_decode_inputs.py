"""A decode step's inputs: kernel against reference, and both against plain counting."""

import pytest
import torch

from tandem_kernels.decode_inputs import DecodeInputs, kernel, reference


def _poisoned(batch: int, device: torch.device) -> DecodeInputs:
    def wrong(dtype: torch.dtype) -> torch.Tensor:
        return torch.full((batch,), -77, dtype=dtype, device=device)

    ids, positions, blocks, offsets = (wrong(torch.int64) for _ in range(4))
    return DecodeInputs(ids, positions, blocks, offsets, wrong(torch.int32))


@pytest.mark.parametrize(("batch", "page"), [(1, 16), (3, 64), (130, 16)])
def test_fill_inputs(device: torch.device, batch: int, page: int) -> None:
    tables = torch.randint(0, 10_000, (batch, 9), dtype=torch.int32, device=device)
    position = torch.randint(0, 9 * page, (batch,), dtype=torch.int32, device=device)
    position[batch // 2 :][1::3] = -1
    sampled = torch.randint(0, 200_000, (batch + 5,), device=device)
    source = torch.randint(-batch, 200_000, (batch,), dtype=torch.int32, device=device)
    source[::2] = -1 - torch.arange(batch, device=device, dtype=torch.int32)[::2]
    staged = torch.stack((source, position))
    found, expected = _poisoned(batch, device), _poisoned(batch, device)
    kernel.fill_inputs(staged, sampled, tables, page, found)
    reference.fill_inputs(staged, sampled, tables, page, expected)
    for name in DecodeInputs.__slots__:
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    for row in range(batch):
        place = int(position[row])
        assert int(expected.lengths[row]) == place + 1
        if place < 0:
            assert int(expected.slot_blocks[row]) == -1
            continue
        before = int(source[row])
        token = before if before >= 0 else int(sampled[-1 - before])
        assert int(expected.token_ids[row]) == token
        assert int(expected.slot_blocks[row]) == int(tables[row, place // page])
