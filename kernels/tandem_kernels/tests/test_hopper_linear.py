"""Linear layers on Hopper: what they are chosen for anywhere, the kernel itself on a GPU only."""

import pytest
import torch

from tandem_kernels import linear as layers
from tandem_kernels import tuning
from tandem_kernels.linear import hopper_linear as hopper
from tandem_kernels.linear import reference
from tandem_kernels.linear.hopper_linear import HopperTiles, hopper_linear, suits
from tandem_kernels.tests.paged_case import relative_error

NAN = float("nan")


@pytest.fixture
def tuned(monkeypatch):
    """A table with one shape, on a device that the Gluon kernel can be used on."""
    table = {"8x64": {"16": [16, 64, 64, 4, 8, 132], "64": []}, "8x64 gate": {"4": [8] * 6}}
    monkeypatch.setattr(tuning, "_shapes", lambda op: table if op == "hopper gemm" else {})
    monkeypatch.setattr(hopper, "suits", lambda x, weight: True)


@pytest.mark.parametrize(
    ("rows", "gate", "expected"),
    [(1, False, None), (2, False, 16), (16, False, 16), (17, False, None), (65, False, None),
     (4, True, 8), (5, True, None)],
)  # fmt: skip
def test_it_is_chosen_for_what_was_measured(rows, gate, expected, tuned):
    x = torch.zeros(rows, 64, dtype=torch.bfloat16)
    weight = torch.zeros(16 if gate else 8, 64, dtype=torch.bfloat16)
    tiles = layers._hopper_tiles(x, weight, gate)
    assert (tiles and tiles.block_m) == expected
    assert layers._hopper_tiles(x.float(), weight.float(), gate) is None


def test_it_suits_no_cpu():
    x = torch.zeros(4, 64, dtype=torch.bfloat16)
    assert not suits(x, x)


def test_what_fits():
    assert HopperTiles(64, 128, 64, 8, 8, 132).fits(gate=False)
    assert not HopperTiles(64, 128, 64, 8, 10, 132).fits(gate=False)  # shared memory
    assert not HopperTiles(256, 128, 64, 4, 3, 132).fits(gate=False)  # registers
    assert HopperTiles(256, 64, 64, 8, 4, 132).fits(gate=True)
    assert not HopperTiles(256, 128, 64, 8, 4, 264).fits(gate=False)  # the parts' memory


CASES = [
    # rows, columns, size, gate, bias, gelu, tiles
    (16, 4096, 4096, False, False, False, (16, 64, 64, 4, 8, 132)),
    (3, 6184, 4096, False, True, False, (8, 64, 128, 4, 6, 132)),
    (33, 4100, 4160, False, True, False, (64, 128, 64, 8, 8, 132)),
    (29, 1000, 14336, True, False, False, (32, 64, 64, 4, 6, 132)),
    (64, 14336, 4096, True, False, True, (64, 64, 64, 4, 8, 132)),
    (32, 4096, 14336, False, False, False, (32, 64, 128, 4, 5, 264)),
    (130, 3000, 4096, False, True, False, (256, 128, 64, 8, 4, 132)),
    (200, 2000, 4096, True, False, False, (256, 64, 64, 8, 4, 132)),
    (100, 4096, 4096, False, False, False, (128, 128, 128, 8, 3, 128)),
    (2, 40, 64, False, True, False, (8, 64, 64, 4, 8, 132)),
    (60, 500, 192, True, False, False, (64, 128, 64, 8, 4, 132)),
    (128, 4096, 4096, False, False, False, (128, 256, 64, 8, 4, 132)),
]


class HopperCase:
    """One product into memory full of NaN, of which nothing but the product may be written."""

    def __init__(self, case, dtype):
        self.rows, self.columns, size, self.gate, bias, self.gelu, tiles = case
        torch.manual_seed(3)
        device = torch.device("cuda")
        self.x = torch.randn(self.rows, size + 64, device=device).to(dtype)[:, :size]
        height = self.columns * (2 if self.gate else 1)
        self.weight = (torch.randn(height, size, device=device) * 0.05).to(dtype)
        self.bias = torch.randn(self.columns, device=device).to(dtype) if bias else None
        self.memory = torch.full((self.rows + 8, self.columns + 8), NAN, dtype=dtype, device=device)
        self.out = self.memory[: self.rows, : self.columns]
        self.tiles = HopperTiles(*tiles)

    def run(self, overlap=False):
        hopper_linear(
            self.x, self.weight, self.bias, gate=self.gate, gelu=self.gelu, out=self.out,
            tiles=self.tiles, overlap=overlap,
        )  # fmt: skip

    def error(self):
        x, weight = self.x.double(), self.weight.double()
        if self.gate:
            return relative_error(self.out, reference.gated_linear(x, weight, self.gelu))
        bias = None if self.bias is None else self.bias.double()
        return relative_error(self.out, reference.linear(x, weight, bias))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_products(case, dtype):
    case = HopperCase(case, dtype)
    assert suits(case.x, case.weight)
    case.run()
    assert case.error() < 5e-3
    assert case.memory[case.rows :].isnan().all()
    assert case.memory[:, case.columns :].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_overlapping_launches_in_a_graph_give_the_same_each_time(case):
    case = HopperCase(case, torch.bfloat16)
    case.run()
    first = case.out.clone()
    graph = torch.cuda.CUDAGraph()
    copies = []
    with torch.cuda.graph(graph):
        for _ in range(10):
            case.out.fill_(NAN)
            case.run(overlap=True)
            copies.append(case.out.clone())
            case.x.mul_(1.0)  # the next launch may not read x before this has ended
            case.run(overlap=True)
            case.run(overlap=True)
    for _ in range(3):
        graph.replay()
    assert all(torch.equal(copy, first) for copy in [*copies, case.out])
    assert not hopper._memory(case.x.device)[1].any()
