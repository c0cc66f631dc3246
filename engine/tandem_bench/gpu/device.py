"""The GPU under test: whether there is one, and what it can do right now."""

import importlib.util
from dataclasses import dataclass
from functools import partial

from tandem_bench.errors import NoGpuError
from tandem_bench.terminal import results


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What this device does right now."""

    device: str
    copy: float
    """Bytes per second, read and written both counted."""
    matmul: float
    """bf16 operations per second, 8192³."""

    def describe(self) -> str:
        """Both rates in a line, after the device's name."""
        return (
            f"{self.device}: copy {self.copy / 1e12:.3f} TB/s, "
            f"matmul {self.matmul / 1e12:.0f} TFLOP/s"
        )


def require_gpu() -> None:
    """Raise NoGpuError, with what to do, where torch, Triton or the GPU is missing."""
    for package, extra in (("torch", "engine"), ("triton", "gpu")):
        if importlib.util.find_spec(package) is None:
            raise NoGpuError(
                f"this benchmark needs {package}, which is not installed",
                f"pip install 'tandem-inference[engine,{extra}]' on a machine with an NVIDIA GPU",
            )
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = "torch sees no NVIDIA GPU" if built else "this torch is built without CUDA"
        raise NoGpuError(
            f"{why}, and this benchmark measures a GPU",
            "run this on a machine with an NVIDIA GPU (check nvidia-smi), or measure the engine on "
            "the CPU with `tandem bench offline`",
        )


def measure_ceilings() -> Ceilings:
    """A copy between buffers of 4 GiB (the faster of two ways), and a product of 8192³."""
    import torch

    from tandem_bench.gpu.timing import seconds_eager

    source = torch.empty(1 << 31, dtype=torch.bfloat16, device="cuda")
    for part in source.split(1 << 28):
        part.normal_()
    target = torch.empty_like(source)
    ways = [partial(target.copy_, source), partial(torch.neg, source, out=target)]
    copy = min(seconds_eager(way) for way in ways)
    moved = 2 * source.nbytes
    del source, target, ways
    torch.cuda.empty_cache()
    size = 8192
    a = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    b, c = torch.randn_like(a), torch.empty_like(a)
    product = seconds_eager(partial(torch.mm, a, b, out=c), 20)
    return Ceilings(torch.cuda.get_device_name(), moved / copy, 2 * size**3 / product)


def find_ceilings(seed: int = 0) -> Ceilings:
    """Seed torch, measure what the GPU does, and print it with the versions.

    Raises:
        NoGpuError: there is nothing to measure.
    """
    require_gpu()
    import torch
    import triton

    torch.manual_seed(seed)
    ceilings = measure_ceilings()
    results.print(
        f"{ceilings.describe()}, torch {torch.__version__}, triton {triton.__version__}",
        soft_wrap=True,
    )
    return ceilings
