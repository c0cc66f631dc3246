"""The fused rotation and KV write against the reference in plain torch."""

import pytest
import torch

from tandem_kernels.rope import kernel, reference
from tandem_kernels.tests.paged_case import relative_error


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(32, 8, 128), (7, 1, 64), (4, 4, 80), (20, 20, 32)]
)
@pytest.mark.parametrize("norm", [None, True, False])
def test_matches_the_reference(
    device: torch.device, heads: int, kv_heads: int, head_dim: int, norm: bool | None
) -> None:
    num_tokens, page = 9, 16
    qkv = torch.randn(num_tokens, (heads + 2 * kv_heads) * head_dim, device=device)
    angles = torch.rand(num_tokens, head_dim // 2, device=device) * 6
    blocks = torch.randperm(40, device=device)[:num_tokens]
    blocks[4] = -1  # padding
    offsets = torch.randint(page, (num_tokens,), device=device)
    query_weight, key_weight = (
        None if norm is None else torch.randn(head_dim, device=device) for _ in range(2)
    )
    shape = (2, 40, kv_heads, page, head_dim)
    caches = [torch.full(shape, float("nan"), device=device) for _ in range(2)]
    tables, places = (angles.cos(), angles.sin()), (blocks, offsets)
    norms = (query_weight, key_weight)
    found = kernel.rope_and_write(
        qkv, heads, *tables, caches[0][0], caches[0][1], *places, *norms, 1e-6, bool(norm)
    )
    expected = reference.rope_and_write(
        qkv, heads, *tables, caches[1][0], caches[1][1], *places, *norms, 1e-6, bool(norm)
    )
    assert relative_error(found, expected) < 1e-5
    assert torch.equal(caches[0].isnan(), caches[1].isnan())
    assert relative_error(caches[0].nan_to_num(), caches[1].nan_to_num()) < 1e-5
    part = qkv[:, : heads * head_dim].unflatten(1, (heads, head_dim))
    kernel.rope_and_write(
        qkv, heads, *tables, caches[0][0], caches[0][1], *places, *norms, 1e-6, bool(norm), out=part
    )
    assert relative_error(part, expected) < 1e-5
