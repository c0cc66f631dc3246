"""Linear layers on Hopper: the choice is tested anywhere, the kernel itself only on a GPU."""

import json
from importlib import resources

import pytest
import torch

from tandem_kernels import linear as layers
from tandem_kernels import tuning
from tandem_kernels.linear import hopper_linear as hopper
from tandem_kernels.linear import reference
from tandem_kernels.linear.hopper_linear import HopperTiles, hopper_linear, suits
from tandem_kernels.tests.paged_case import relative_error

NAN = float("nan")
Case = tuple[int, int, int, bool, tuple[int, ...]]
"""Rows, columns, size, bias, and the fields of HopperTiles."""

FILES = ("nvidia_h100_80gb_hbm3.json", "nvidia_h200.json")
SHIPPED = [
    (tuple(map(int, shape.split("x"))), HopperTiles(*tiles))
    for name in FILES
    for shape, by_rows in json.loads(
        (resources.files(tuning.__package__) / "tuned" / name).read_text()
    )["hopper gemm"].items()
    for tiles in by_rows.values()
    if tiles
]


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table with one shape."""
    table = {"8x64": {"4": [], "16": [16, 64, 64, 4, 8, 132], "64": []}}
    monkeypatch.setattr(tuning, "_shapes", lambda op: table if op == "hopper gemm" else {})


ROWS = [(1, None), (2, None), (4, None), (5, 16), (16, 16), (17, None), (65, None)]


@pytest.mark.parametrize(("rows", "expected"), ROWS)
def test_it_is_chosen_for_what_was_measured(
    rows: int, expected: int | None, tuned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hopper, "suits", lambda x, weight: True)
    x = torch.zeros(rows, 64, dtype=torch.bfloat16)
    tiles = layers.hopper_tiles(x, torch.zeros(8, 64, dtype=torch.bfloat16))
    assert (tiles and tiles.block_m) == expected
    assert layers.hopper_tiles(x, torch.zeros(16, 64, dtype=torch.bfloat16)) is None


def test_it_is_chosen_nowhere_else(tuned: None) -> None:
    x = torch.zeros(16, 64, dtype=torch.bfloat16)
    assert not suits(x, x)
    assert layers.hopper_tiles(x, torch.zeros(8, 64, dtype=torch.bfloat16)) is None


def test_what_fits() -> None:
    assert HopperTiles(64, 128, 64, 8, 8, 132).fits()
    assert not HopperTiles(64, 128, 64, 8, 10, 132).fits()  # shared memory
    assert not HopperTiles(256, 128, 64, 4, 3, 32).fits()  # registers
    assert not HopperTiles(64, 128, 64, 8, 4, 264).fits()  # the parts' memory
    assert not HopperTiles(16, 64, 64, 8, 4, 132).fits()  # warps without rows
    assert all(tiles.fits() for _, tiles in SHIPPED)


CASES: list[Case] = [
    (16, 4096, 4096, False, (16, 64, 64, 4, 8, 132)),
    (3, 6184, 4096, True, (8, 64, 128, 4, 6, 132)),
    (33, 4100, 4160, True, (64, 128, 64, 8, 8, 132)),
    (32, 4096, 14336, False, (32, 64, 128, 4, 4, 264)),
    (64, 3000, 4096, True, (64, 64, 256, 4, 3, 128)),
    (50, 1000, 14336, False, (64, 128, 128, 8, 4, 128)),
    (2, 40, 64, True, (8, 64, 64, 4, 8, 132)),
    (60, 500, 192, False, (64, 128, 64, 4, 4, 132)),
]
CASES += [
    (rows, columns, size, False, tuple(getattr(tiles, name) for name in HopperTiles.__slots__))
    for (columns, size), tiles in SHIPPED
    for rows in (5, 8, 24, 32, 64)
    if tiles.block_m // 4 < rows <= tiles.block_m
]


class HopperCase:
    """One product into memory full of NaN, of which nothing but the product may be written."""

    def __init__(self, case: Case, dtype: torch.dtype):
        self.rows, self.columns, size, bias, tiles = case
        torch.manual_seed(3)
        device = torch.device("cuda")
        self.x = torch.randn(self.rows, size + 64, device=device).to(dtype)[:, :size]
        self.weight = (torch.randn(self.columns, size, device=device) * 0.05).to(dtype)
        self.bias = torch.randn(self.columns, device=device).to(dtype) if bias else None
        self.memory = torch.full((self.rows + 8, self.columns + 8), NAN, dtype=dtype, device=device)
        self.out = self.memory[: self.rows, : self.columns]
        self.tiles = HopperTiles(*tiles)

    def run(self) -> None:
        hopper_linear(self.x, self.weight, self.bias, out=self.out, tiles=self.tiles, overlap=True)

    def error(self) -> float:
        bias = None if self.bias is None else self.bias.double()
        expected = reference.linear(self.x.double(), self.weight.double(), bias)
        return relative_error(self.out, expected)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, torch.bfloat16) for case in CASES), *((case, torch.float16) for case in CASES[:3])],
)
def test_products(case: Case, dtype: torch.dtype) -> None:
    product = HopperCase(case, dtype)
    assert suits(product.x, product.weight)
    product.run()
    assert product.error() < 5e-3
    assert product.memory[product.rows :].isnan().all()
    assert product.memory[:, product.columns :].isnan().all()


@pytest.mark.gpu
def test_sums_are_not_rounded_for_float32() -> None:
    (columns, size), tiles = SHIPPED[0]
    x = torch.randn(32, size, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(columns, size, device="cuda", dtype=torch.bfloat16)
    out = torch.full((32, columns), NAN, device="cuda")
    hopper_linear(x, weight, out=out, tiles=tiles, overlap=True)
    assert relative_error(out, reference.linear(x.double(), weight.double())) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_overlapping_launches_in_a_graph_give_the_same_each_time(case: Case) -> None:
    product = HopperCase(case, torch.bfloat16)
    product.run()
    first = product.out.clone()
    graph = torch.cuda.CUDAGraph()
    copies = []
    with torch.cuda.graph(graph):
        for _ in range(10):
            product.out.fill_(NAN)
            product.run()
            copies.append(product.out.clone())
            product.x.mul_(1.0)  # the next launch may not read x before this has ended
            product.run()
            product.run()
    for _ in range(3):
        graph.replay()
    assert all(torch.equal(copy, first) for copy in [*copies, product.out])
    assert not hopper._memory(product.x.device)[1].any()


@pytest.mark.gpu
def test_different_products_in_a_row_share_the_memory_for_parts() -> None:
    """As a layer has them: one's sums must not be taken for the other's, nor its counts."""
    cases = [HopperCase(case, torch.bfloat16) for case in CASES]
    for case in cases:
        case.run()
    firsts = [case.out.clone() for case in cases]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for case in cases:
            case.out.fill_(NAN)
        for case in cases * 3:
            case.run()
    for _ in range(5):
        graph.replay()
        assert all(torch.equal(case.out, first) for case, first in zip(cases, firsts, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [4, 5, 32, 33])
def test_linear(rows: int) -> None:
    """By the table where it is this device's, and the same everywhere."""
    (columns, size), _ = SHIPPED[0]
    x = torch.randn(rows, size, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(columns, size, device="cuda", dtype=torch.bfloat16)
    if torch.cuda.get_device_capability()[0] == 9:
        tuned = tuning.tuned_hopper_gemm(rows, columns, size)
        assert (layers.hopper_tiles(x, weight) is None) == (tuned is None)
    expected = reference.linear(x.double(), weight.double())
    assert relative_error(layers.linear(x, weight), expected) < 1e-2
