"""The fused rotation and KV write against the reference in plain torch."""

import pytest
import torch

from tandem_kernels.rope import kernel, reference
from tandem_kernels.tests.paged_case import relative_error


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(32, 8, 128), (7, 1, 64), (4, 4, 80), (20, 20, 32)]
)
@pytest.mark.parametrize("norm", [None, True, False])
def test_matches_the_reference(device, heads, kv_heads, head_dim, norm):
    num_tokens, page = 9, 16
    qkv = torch.randn(num_tokens, (heads + 2 * kv_heads) * head_dim, device=device)
    angles = torch.rand(num_tokens, head_dim // 2, device=device) * 6
    blocks = torch.randperm(40, device=device)[:num_tokens]
    blocks[4] = -1  # padding
    offsets = torch.randint(page, (num_tokens,), device=device)
    weights = (None, None)
    if norm is not None:
        weights = (torch.randn(head_dim, device=device), torch.randn(head_dim, device=device))
    shape = (2, 40, kv_heads, page, head_dim)
    caches = [torch.full(shape, float("nan"), device=device) for _ in range(2)]
    options = (*weights, 1e-6, bool(norm))
    found, expected = (
        run(qkv, heads, angles.cos(), angles.sin(), *cache, blocks, offsets, *options)
        for run, cache in zip(
            (kernel.rope_and_write, reference.rope_and_write), caches, strict=True
        )
    )
    assert relative_error(found, expected) < 1e-5
    assert torch.equal(caches[0].isnan(), caches[1].isnan())
    assert relative_error(caches[0].nan_to_num(), caches[1].nan_to_num()) < 1e-5
    kernel.rope_and_write(
        qkv, heads, angles.cos(), angles.sin(), *caches[0], blocks, offsets, *options,
        out=(part := qkv[:, : heads * head_dim].unflatten(1, (heads, head_dim))),
    )  # fmt: skip
    assert relative_error(part, expected) < 1e-5
