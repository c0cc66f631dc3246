"""Kernels and steps are measured, on a GPU."""

import json
from pathlib import Path

import pytest

from tandem_bench.engine.step import decode_lines, prefill_lines, read_config, shape_fields
from tandem_bench.kernels.suite import choose_stages

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("model", ["llama-8b", "qwen2.5-7b", "qwen3-0.6b"])
def test_steps_are_right_and_have_a_floor(model: str) -> None:
    from tandem_bench.gpu.device import measure_ceilings
    from tandem_bench.kernels.decode_step import Shape

    fields = shape_fields(read_config(model))
    assert fields is not None
    shape = Shape(**{**fields, "layers": 2})
    ceilings = measure_ceilings()
    lines = [
        *decode_lines(shape, [(1, 4096), (32, 4096)], ceilings),
        *prefill_lines(shape, [(4096, 2048)], ceilings),
    ]
    assert len(lines) == 3
    assert all(0 < line.error < 2e-2 and line.percent > 0 for line in lines)


def test_a_stage_gives_lines_that_can_be_written(tmp_path: Path) -> None:
    from tandem_bench.gpu.device import measure_ceilings

    lines = list(choose_stages("rows")["rows"](measure_ceilings()))
    assert lines
    (tmp_path / "lines.json").write_text(json.dumps([line.to_json() for line in lines]))
