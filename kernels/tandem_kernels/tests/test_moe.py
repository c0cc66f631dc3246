"""Mixture of experts against the reference in float64."""

import json
from importlib import resources

import pytest
import torch

from tandem_kernels.moe import Routing, kernel, plan_kernel, reference, route_kernel
from tandem_kernels.moe.kernel import ExpertTiles, ProductTiles
from tandem_kernels.moe.plan_kernel import ExpertPlan
from tandem_kernels.moe.token_kernel import VectorTiles
from tandem_kernels.tests.paged_case import relative_error

ROUTINGS = {
    "mixtral": (8, Routing(2, renormalise=True)),
    "qwen3": (16, Routing(4, renormalise=True)),
    "qwen2": (10, Routing(3)),
    "one": (5, Routing(1)),
    "deepseek_v2": (20, Routing(3, num_groups=5, top_groups=2, scale=16.0)),
    "deepseek_v3": (
        32,
        Routing(4, "sigmoid", True, num_groups=4, top_groups=2, group_score="top2", scale=2.5),
    ),
    "bias without groups": (16, Routing(4, "sigmoid", True)),
}
Tiles = ExpertTiles | VectorTiles
TILES = ExpertTiles(16, ProductTiles(16, 32, 4, 2, 2), ProductTiles(32, 16, 4, 2))


def make_experts(
    num_experts: int, hidden: int, intermediate: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    gate_up = torch.randn(num_experts, 2 * intermediate, hidden, device=device) * hidden**-0.5
    down = torch.randn(num_experts, hidden, intermediate, device=device) * intermediate**-0.5
    return gate_up.to(dtype), down.to(dtype)


def expected_of(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gelu: bool = False,
) -> torch.Tensor:
    return reference.apply_experts(
        x.double(), weights.double(), ids, gate_up.double(), down.double(), gelu
    )


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("tokens", [1, 3, 130])
def test_route(device: torch.device, name: str, tokens: int) -> None:
    num_experts, routing = ROUTINGS[name]
    logits = torch.randn(tokens, num_experts + 3, device=device)[:, :num_experts] * 2
    bias = torch.randn(num_experts, device=device) if routing.scoring == "sigmoid" else None
    weights, ids = route_kernel.route(logits, routing, bias)
    expected_weights, expected_ids = reference.route(logits, routing, bias)
    assert torch.equal(ids, expected_ids)
    assert relative_error(weights, expected_weights) < 1e-5
    if routing.renormalise:
        assert torch.allclose(weights.sum(-1), torch.full_like(weights[:, 0], routing.scale))


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 0.0])
def test_logits_that_say_nothing_still_choose_experts(
    device: torch.device, name: str, tokens: int, value: float
) -> None:
    num_experts, routing = ROUTINGS[name]
    logits = torch.full((tokens, num_experts), value, device=device)
    _, ids = route_kernel.route(logits, routing)
    plan = plan_kernel.plan_small(logits, routing, None, 16)
    for row in ids.tolist():
        assert len(set(row)) == routing.top_k
        assert all(0 <= expert < num_experts for expert in row)
    check_plan(plan, ids, num_experts, 16)


def check_plan(plan: ExpertPlan, ids: torch.Tensor, num_experts: int, block_m: int) -> None:
    """Every pair once, sorted by expert, and blocks that cover exactly each expert's pairs."""
    flat = ids.flatten().long()
    order = plan.order.long()
    assert torch.equal(order.sort().values, torch.arange(flat.numel(), device=flat.device))
    counts = torch.bincount(flat, minlength=num_experts).tolist()
    experts, starts, sizes = plan.blocks.tolist()
    covered: list[int] = []
    for expert, start, size in zip(experts, starts, sizes, strict=True):
        if size:
            assert flat[order[start : start + size]].tolist() == [expert] * size
            assert size <= block_m
            covered += range(start, start + size)
            counts[expert] -= size
    assert sorted(covered) == list(range(flat.numel()))
    assert not any(counts)


@pytest.mark.parametrize(("tokens", "chunk"), [(2, 64), (3, 8), (17, 4096), (130, 128)])
@pytest.mark.parametrize("skew", [0.0, 50.0])
def test_plans(device: torch.device, tokens: int, chunk: int, skew: float) -> None:
    num_experts, block_m = 12, 16
    routing = Routing(3)
    logits = torch.randn(tokens, num_experts, device=device)
    logits[:, 4] += skew
    weights, ids = route_kernel.route(logits, routing)
    small = plan_kernel.plan_small(logits, routing, None, block_m)
    assert torch.allclose(small.weights, weights)
    large = plan_kernel.plan_large(weights, ids, num_experts, block_m, chunk=chunk)
    given = plan_kernel.plan_given(weights, ids, num_experts, block_m)
    for plan in (small, large, given):
        check_plan(plan, ids, num_experts, block_m)
    assert torch.equal(small.order, large.order)
    assert torch.equal(small.blocks[2], large.blocks[2])


@pytest.mark.parametrize("tokens", [1, 3, 17, 130])
@pytest.mark.parametrize("name", ["mixtral", "qwen3", "one", "deepseek_v3"])
def test_fused_moe(device: torch.device, half: torch.dtype, tokens: int, name: str) -> None:
    num_experts, routing = ROUTINGS[name]
    hidden, intermediate = 72, 40
    x = torch.randn(tokens, hidden, device=device).to(half)
    logits = torch.randn(tokens, num_experts, device=device)
    bias = torch.randn(num_experts, device=device) if routing.scoring == "sigmoid" else None
    gate_up, down = make_experts(num_experts, hidden, intermediate, half, device)
    out = torch.full_like(x, float("nan"))
    tiles = VectorTiles(4, 32, 4, 1, 8, 16, 4, 2) if tokens == 1 else TILES
    kernel.fused_moe(x, logits, gate_up, down, routing, bias, out=out, tiles=tiles)
    weights, ids = reference.route(logits, routing, bias)
    assert relative_error(out, expected_of(x, weights, ids, gate_up, down)) < 1e-2


@pytest.mark.parametrize("tokens", [5, 150])
def test_weights_through_descriptors(device: torch.device, half: torch.dtype, tokens: int) -> None:
    """Columns and steps that don't divide the sizes, and blocks above and below 64 pairs."""
    num_experts, hidden, intermediate, routing = 3, 72, 40, Routing(2, renormalise=True)
    x = torch.randn(tokens, hidden, device=device).to(half)
    logits = torch.randn(tokens, num_experts, device=device)
    gate_up, down = make_experts(num_experts, hidden, intermediate, half, device)
    out = torch.full_like(x, float("nan"))
    product = ProductTiles(64, 64, 8, 2, 2, tma=1)
    tiles = ExpertTiles(128, product, product)
    kernel.fused_moe(x, logits, gate_up, down, routing, out=out, tiles=tiles)
    weights, ids = reference.route(logits, routing)
    assert relative_error(out, expected_of(x, weights, ids, gate_up, down)) < 1e-2


def shipped_tiles() -> list[tuple[Tiles, int]]:
    """Every configuration that any device is given, with the token count it is for."""
    found: dict[Tiles, int] = {}
    for path in (resources.files("tandem_kernels") / "tuned").iterdir():
        for shapes in json.loads(path.read_text()).get("moe", {}).values():
            for count, entry in shapes.items():
                found[kernel.tiles_of(entry)] = int(count)
    return sorted(found.items(), key=lambda item: item[1])


@pytest.mark.parametrize(("tiles", "count"), shipped_tiles())
def test_shipped_configurations(
    device: torch.device, half: torch.dtype, tiles: Tiles, count: int
) -> None:
    num_experts, hidden, intermediate, routing = 3, 160, 96, Routing(2, renormalise=True)
    tokens = min(count, 150)
    x = torch.randn(tokens, hidden, device=device).to(half)
    logits = torch.randn(tokens, num_experts, device=device)
    gate_up, down = make_experts(num_experts, hidden, intermediate, half, device)
    out = torch.full_like(x, float("nan"))
    overlap = device.type == "cuda"
    kernel.fused_moe(x, logits, gate_up, down, routing, out=out, tiles=tiles, overlap=overlap)
    weights, ids = reference.route(logits, routing)
    assert relative_error(out, expected_of(x, weights, ids, gate_up, down)) < 1e-2


@pytest.mark.parametrize("top_k", [1, 2, 8])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_all_tokens_on_the_same_experts(
    device: torch.device, half: torch.dtype, top_k: int, tokens: int
) -> None:
    num_experts, hidden, intermediate = 9, 64, 33
    x = torch.randn(tokens, hidden, device=device).to(half)
    gate_up, down = make_experts(num_experts, hidden, intermediate, half, device)
    ids = torch.arange(num_experts - top_k, num_experts, device=device).repeat(tokens, 1)
    weights = torch.rand(tokens, top_k, device=device)
    # An expert that nobody chose must not be read.
    gate_up[: num_experts - top_k] = float("nan")
    down[: num_experts - top_k] = float("nan")
    out = torch.full_like(x, float("nan"))
    kernel.apply_experts(x, weights, ids, gate_up, down, gelu=True, out=out)
    assert relative_error(out, expected_of(x, weights, ids, gate_up, down, True)) < 1e-2


@pytest.mark.parametrize("tokens", [1, 5])
def test_float32_is_exact(device: torch.device, tokens: int) -> None:
    num_experts, routing = ROUTINGS["qwen3"]
    x = torch.randn(tokens, 50, device=device)
    logits = torch.randn(tokens, num_experts, device=device)
    gate_up, down = make_experts(num_experts, 50, 24, torch.float32, device)
    found = kernel.fused_moe(x, logits, gate_up, down, routing)
    weights, ids = reference.route(logits, routing)
    assert relative_error(found, expected_of(x, weights, ids, gate_up, down)) < 2e-6
    assert relative_error(reference.fused_moe(x, logits, gate_up, down, routing), found) < 2e-6


@pytest.mark.parametrize("tokens", [1, 2])
def test_experts_past_two_gigaelements(
    device: torch.device, half: torch.dtype, tokens: int
) -> None:
    """Only the pages that are used become real memory on the CPU."""
    hidden, intermediate = 1 << 15, 64
    num_experts = (1 << 31) // (hidden * intermediate) + 2
    down = torch.empty(num_experts, hidden, intermediate, dtype=half, device=device)
    gate_up = torch.empty(num_experts, 2 * intermediate, hidden, dtype=half, device=device)
    some = [num_experts - 1, 3]
    for expert in some:
        gate_up[expert] = torch.randn(gate_up.shape[1:], device=device).to(half) * hidden**-0.5
        down[expert] = torch.randn(down.shape[1:], device=device).to(half) * intermediate**-0.5
    x = torch.randn(tokens, hidden, device=device).to(half)
    ids = torch.tensor([some] * tokens, device=device)
    weights = torch.rand(tokens, 2, device=device)
    tiles = (
        VectorTiles(8, 1024, 4, 1, 256, 64, 4, 1)
        if tokens == 1
        else ExpertTiles(16, ProductTiles(64, 256, 4, 1), ProductTiles(256, 64, 4, 1))
    )
    found = kernel.apply_experts(x, weights, ids, gate_up, down, tiles=tiles)
    compact = torch.tensor([[0, 1]] * tokens, device=device)
    expected = expected_of(x, weights, compact, gate_up[some], down[some])
    assert relative_error(found, expected) < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 7, 64, 600])
def test_a_graph_serves_every_routing(tokens: int) -> None:
    torch.manual_seed(5)
    device = torch.device("cuda")
    routing = Routing(4, renormalise=True)
    gate_up, down = make_experts(32, 256, 128, torch.bfloat16, device)
    x = torch.randn(tokens, 256, device=device, dtype=torch.bfloat16)
    logits = torch.randn(tokens, 32, device=device)
    for overlap in (False, True):
        kernel.fused_moe(x, logits, gate_up, down, routing, overlap=overlap)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = kernel.fused_moe(x, logits, gate_up, down, routing, overlap=overlap)
        for skew in (0.0, 100.0, 0.0):
            logits.normal_()
            logits[:, 7] += skew
            x.normal_()
            found.fill_(float("nan"))
            graph.replay()
            weights, ids = reference.route(logits, routing)
            assert relative_error(found, expected_of(x, weights, ids, gate_up, down)) < 1e-2
