"""What kernels and steps need before they can be measured."""

import importlib.util

from tandem_bench.errors import NoGpuError


def require_gpu() -> None:
    """Raise NoGpuError, with what to do, where torch, Triton or the GPU is missing."""
    for package, extra in (("torch", "engine"), ("triton", "gpu")):
        if importlib.util.find_spec(package) is None:
            raise NoGpuError(
                f"kernels are measured with {package}, which is not installed",
                f"pip install 'tandem-inference[engine,{extra}]' on a machine with an NVIDIA GPU",
            )
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = "torch sees no NVIDIA GPU" if built else "this torch is built without CUDA"
        raise NoGpuError(
            f"{why}; kernels and steps have nothing to be measured on",
            "run this on a machine with an NVIDIA GPU (check nvidia-smi), or measure the engine on "
            "the CPU with `tandem bench offline`",
        )
