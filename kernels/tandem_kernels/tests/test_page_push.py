"""Pages into another cache through a gate: against the reference, and after the gate was shut."""

import pytest
import torch

from tandem_kernels.checksum.reference import MASK, signed
from tandem_kernels.page_push import GENERATION, PageTarget, kernel, reference

SEED = (1 << 63) + 99
SHAPES = [((4, 2), (2, 4, 6)), ((3, 1), (1, 4, 12)), ((2, 2), (2, 16, 64))]
"""[layers, planes] and [heads, tokens, dim]."""


class Caches:
    """P's and D's, of different numbers of blocks, and D's gates: the one at 3 is used."""

    def __init__(self, device: torch.device, shape: tuple[tuple[int, ...], ...]) -> None:
        sides, page = shape
        self.source, self.target = (
            torch.randint(0, 256, (*sides, blocks, *page), dtype=torch.uint8, device=device)
            for blocks in (7, 11)
        )
        self.gates = torch.zeros(5, dtype=torch.int64, device=device)
        self.gate = self.gates.data_ptr() + 3 * 8
        self.blocks = torch.tensor([6, 0, 3, 4], device=device)
        self.places = torch.tensor([1, 10, 2, 0], device=device)
        self.layers = range(1, sides[0])

    def push(self, generation: int = 0, seed: int | None = SEED, piece: int = 4) -> list[int]:
        """Checksum, programs admitted, programs launched."""
        place = PageTarget(self.target.data_ptr(), 11, self.gate, generation)
        job = self.job(seed or 0)
        launched = kernel.push_pages(
            self.source,
            self.blocks,
            place,
            self.places,
            self.layers,
            job,
            check=seed is not None,
            piece=piece,
        )
        total, admitted, _ = job.tolist()
        return [total & MASK, admitted, launched]

    def expect(self) -> tuple[torch.Tensor, int]:
        """D's cache after a push, and its checksum."""
        expected = self.target.clone()
        total = reference.push_pages(
            self.source, self.blocks, expected, self.places, self.gates[3:4], 0, self.layers, SEED
        )
        assert total is not None
        return expected, total & MASK

    def sum(self, blocks: torch.Tensor) -> int:
        job = self.job(SEED)
        kernel.sum_pages(self.target, blocks, self.layers, job, piece=4)
        return int(job[0]) & MASK

    def job(self, seed: int) -> torch.Tensor:
        return torch.tensor([0, 0, signed(seed)], device=self.source.device)


@pytest.fixture(name="few_programs", params=[2, 1000])
def few_programs_fixture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_PROGRAMS", request.param)


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("shape", SHAPES)
def test_pages_and_checksum_are_the_references(
    device: torch.device, shape: tuple[tuple[int, ...], ...]
) -> None:
    caches = Caches(device, shape)
    expected, total = caches.expect()
    found, admitted, launched = caches.push(piece=32)
    assert (found, admitted) == (total, launched)
    assert torch.equal(caches.target, expected)
    assert caches.sum(caches.places) == total
    assert caches.sum(caches.places.flip(0)) != total
    caches.target[1, 0, 10, 0, 0, 0] ^= 1
    assert caches.sum(caches.places) != total
    assert not caches.gates.any(), "everyone has left"


def test_without_checksum(device: torch.device) -> None:
    caches = Caches(device, SHAPES[0])
    expected, _ = caches.expect()
    found, admitted, launched = caches.push(seed=None)
    assert (found, admitted) == (0, launched)
    assert torch.equal(caches.target, expected)


def test_a_launch_after_its_gate_was_shut_writes_nothing(device: torch.device) -> None:
    """What a writer does that was frozen before its launch, whenever it wakes."""
    caches = Caches(device, SHAPES[0])
    before = caches.target.clone()
    kernel.shut_gate(caches.gate)
    assert caches.gates.tolist() == [0, 0, 0, GENERATION, 0]
    assert caches.push()[:2] == [0, 0]
    assert torch.equal(caches.target, before)
    assert caches.gates[3] == GENERATION, "everyone has left"
    assert caches.push(generation=1)[1] > 0, "the next session's writer is admitted"
    assert not torch.equal(caches.target, before)


def test_those_inside_are_not_lost_when_the_gate_is_shut(device: torch.device) -> None:
    """A program that is inside keeps the count above 0 through every change of generation."""
    caches = Caches(device, SHAPES[0])
    caches.gates[3] += 2  # two of another launch are inside
    kernel.shut_gate(caches.gate)
    assert caches.push()[1] == 0
    assert caches.gates[3] == GENERATION + 2
