"""What a benchmark measures against, and the file that it leaves."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import triton

from tandem_kernels.bench.timing import Ceilings, Line, measure_ceilings


def begin(seed: int) -> Ceilings:
    """Seed torch, measure the ceilings and print them with the versions."""
    torch.manual_seed(seed)
    ceilings = measure_ceilings()
    print(
        f"{ceilings.device}: copy {ceilings.copy / 1e12:.3f} TB/s,"
        f" matmul {ceilings.matmul / 1e12:.0f} TFLOP/s,"
        f" torch {torch.__version__}, triton {triton.__version__}",
        flush=True,
    )
    return ceilings


def write_lines(path: str, ceilings: Ceilings, lines: Sequence[Line], **more: Any) -> None:
    """All lines as JSON, and what else there is to know."""
    document = {
        "device": ceilings.device,
        "copy": ceilings.copy,
        "matmul": ceilings.matmul,
        "torch": torch.__version__,
        "triton": triton.__version__,
        **more,
        "lines": [line.to_json() for line in lines],
    }
    Path(path).write_text(json.dumps(document, indent=1))
