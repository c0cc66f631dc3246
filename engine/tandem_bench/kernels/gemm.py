"""Linear layers for few rows beside torch (cuBLAS), as shares of copy bandwidth."""

from dataclasses import dataclass
from functools import partial

import torch

from tandem_bench.gpu.device import Ceilings
from tandem_bench.gpu.lines import Line
from tandem_bench.gpu.timing import check, seconds_per_call
from tandem_kernels.linear import hopper_tiles, reference
from tandem_kernels.linear.hopper_linear import HopperTiles, hopper_linear
from tandem_kernels.linear.kernel import GemmTiles, choose_tiles, small_linear
from tandem_kernels.overlap import is_supported


@dataclass(frozen=True, slots=True)
class GemmShape:
    """[N, K] weights; with `gate` N counts both halves."""

    name: str
    columns: int
    size: int
    gate: bool = False

    @property
    def outputs(self) -> int:
        """What a product writes per row: both halves of a gate become one."""
        return self.columns // (2 if self.gate else 1)

    @property
    def entry(self) -> str:
        """Its name in a device's file."""
        return f"{self.outputs}x{self.size}" + (" gate" if self.gate else "")


LLAMA_8B = [
    GemmShape("qkv", 6144, 4096),
    GemmShape("o", 4096, 4096),
    GemmShape("gate_up", 28672, 4096, True),
    GemmShape("down", 4096, 14336),
    GemmShape("head", 128256, 4096),
]

BITS = {"bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}


class GemmBench:
    """Weights of one shape, enough copies that the L2 holds none of the next."""

    def __init__(self, shape: GemmShape, bits: str = "bf16") -> None:
        self.shape = shape
        bytes_each = shape.columns * shape.size * 2
        copies = max(2, min(12, (400 << 20) // bytes_each))
        self.weights = [
            torch.randn(shape.columns, shape.size, device="cuda", dtype=torch.bfloat16) * 0.02
            for _ in range(copies)
        ]
        self.scale = None
        if bits != "bf16":
            pairs = [reference.quantize_rows(weight, BITS[bits]) for weight in self.weights]
            self.weights, self.scale = [weight for weight, _ in pairs], pairs[0][1]
        self.moved = self.weights[0].nbytes
        self.bits = bits

    def name(self, rows: int) -> str:
        """For the table."""
        return f"{self.shape.name} M={rows} {self.bits}"

    def run_torch(self, rows: int, ceilings: Ceilings) -> Line:
        """cuBLAS, without the activation."""
        x = torch.randn(rows, self.shape.size, device="cuda", dtype=torch.bfloat16)
        out = torch.empty(rows, self.shape.columns, device="cuda", dtype=torch.bfloat16)

        def call(weight: torch.Tensor) -> torch.Tensor:
            return torch.mm(x, weight.t(), out=out)

        seconds = seconds_per_call([partial(call, weight) for weight in self.weights])
        floor = self.moved / ceilings.copy
        return Line(self.name(rows), seconds, floor, 0.0, f"{self.rate(seconds)} cuBLAS")

    def rate(self, seconds: float) -> str:
        """Weight bytes per second."""
        return f"{self.moved / seconds / 1e9:.0f} GB/s"

    def run(self, rows: int, tiles: GemmTiles, ceilings: Ceilings) -> Line:
        """Check, then time, each launch before the last has ended where the device can.

        A gated shape writes act(gate) · up.
        """
        shape = self.shape
        x = torch.randn(rows, shape.size, device="cuda", dtype=torch.bfloat16)
        out = torch.full((rows, shape.outputs), float("nan"), device="cuda", dtype=torch.bfloat16)

        def call(weight: torch.Tensor) -> torch.Tensor:
            return small_linear(
                x, weight, scale=self.scale, gate=shape.gate, out=out, tiles=tiles,
                overlap=is_supported(),
            )  # fmt: skip

        apply = reference.gated_linear if shape.gate else reference.linear
        expected = apply(x.float(), self.weights[0].float(), scale=self.scale)
        error = check(self.name(rows), call(self.weights[0]), expected, 2e-2)
        seconds = seconds_per_call([partial(call, weight) for weight in self.weights])
        floor = self.moved / ceilings.copy
        return Line(self.name(rows), seconds, floor, error, f"{self.rate(seconds)} {tiles}")

    def run_hopper(self, rows: int, tiles: HopperTiles, ceilings: Ceilings) -> Line:
        """Check the Gluon product, then time it as the engine launches it, each before the last
        has ended.
        """
        shape = self.shape
        x = torch.randn(rows, shape.size, device="cuda", dtype=torch.bfloat16)
        out = torch.full((rows, shape.columns), float("nan"), device="cuda", dtype=torch.bfloat16)

        def call(weight: torch.Tensor) -> torch.Tensor:
            return hopper_linear(x, weight, out=out, tiles=tiles, overlap=True)

        expected = reference.linear(x.float(), self.weights[0].float())
        error = check(self.name(rows), call(self.weights[0]), expected, 2e-2)
        seconds = seconds_per_call([partial(call, weight) for weight in self.weights])
        floor = self.moved / ceilings.copy
        return Line(self.name(rows), seconds, floor, error, f"{self.rate(seconds)} {tiles}")

    def run_shipped(self, rows: int, ceilings: Ceilings) -> Line:
        """What the tuned table chooses for this device: one of our kernels, or cuBLAS."""
        shape = self.shape
        columns = shape.columns // (2 if shape.gate else 1)
        if not shape.gate and self.scale is None:
            x = torch.empty(rows, shape.size, device="cuda", dtype=torch.bfloat16)
            on_hopper = hopper_tiles(x, self.weights[0])
            if on_hopper is not None:
                return self.run_hopper(rows, on_hopper, ceilings)
        tiles = choose_tiles(rows, columns, shape.size, shape.gate)
        return self.run_torch(rows, ceilings) if tiles is None else self.run(rows, tiles, ceilings)
