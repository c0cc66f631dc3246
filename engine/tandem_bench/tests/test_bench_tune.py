"""What a search writes into a device's file, and the options of a step that it changes."""

import json
from pathlib import Path

import pytest

from tandem_bench.errors import WorkloadError
from tandem_bench.kernels import decode_step
from tandem_bench.tune import search
from tandem_bench.tune.gemm import fits, tilings
from tandem_bench.tune.search import TunedFile
from tandem_bench.tune.step import Chosen, add_to_file, dense_shape, place, products
from tandem_kernels.linear.hopper_linear import HopperTiles
from tandem_kernels.linear.kernel import GemmTiles

LLAMA = decode_step.Shape()
PLAIN = GemmTiles(16, 32, 128, 4, 6, prefetch=2)
HOPPER = HopperTiles(16, 64, 64, 4, 8, 132)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of the device's file, which the package's own folder doesn't get."""
    found = tmp_path / "device.json"
    monkeypatch.setattr(search, "device_file", lambda device: str(found))
    return found


def test_other_numbers_of_rows_stay_in_an_entry(path: Path) -> None:
    path.write_text(json.dumps({"gemm": {"8x64": {"4": [1], "16": [2]}, "8x32": {"4": [3]}}}))
    TunedFile("any").merge("gemm", "8x64", {"16": [5], "8": [6]})
    written = json.loads(path.read_text())["gemm"]
    assert list(written["8x64"].items()) == [("4", [1]), ("8", [6]), ("16", [5])]
    assert written["8x32"] == {"4": [3]}


def test_a_product_in_gluon_has_one_in_triton_behind_it(path: Path) -> None:
    chosen = Chosen({place(each): HOPPER for each in products(LLAMA)}, {}, (132, 4, True), 0.005)
    gate_up, down, qkv, _, head = (place(each) for each in products(LLAMA))
    chosen.products |= {gate_up: PLAIN, head: None}
    chosen.plain = {down: PLAIN, qkv: None}
    add_to_file(TunedFile("any"), LLAMA, {16: chosen})
    written = json.loads(path.read_text())
    plain, hopper = [16, 32, 128, 4, 6, 2], [16, 64, 64, 4, 8, 132]
    assert written["decode attention"] == {"32/8x128": {"16": [132, 4, 1]}}
    assert written["gemm"] == {
        "14336x4096 gate": {"16": plain},
        "4096x14336": {"16": plain},
        "6144x4096": {"16": []},
        "4096x4096": {"16": []},
        "128256x4096": {"16": []},
    }
    assert written["hopper gemm"] == {
        "4096x14336": {"16": hopper},
        "6144x4096": {"16": hopper},
        "4096x4096": {"16": hopper},
        "128256x4096": {"16": []},
    }


def test_a_step_is_tuned_for_dense_models_only() -> None:
    assert dense_shape("llama-8b") == LLAMA
    assert dense_shape("qwen2.5-7b") == decode_step.Shape(
        28, 3584, 28, 4, 128, 18944, 152064, qkv_bias=True
    )
    with pytest.raises(WorkloadError, match="--model gemma3-4b is not a dense model"):
        dense_shape("gemma3-4b")


def test_options_of_a_step_are_keys_of_its_errors() -> None:
    changed = decode_step.Options(products={(4096, 4096): None})
    assert len({decode_step.Options(), changed, *decode_step.VARIANTS}) == 4


@pytest.mark.parametrize("rows", [1, 8, 64, 128])
def test_every_number_of_rows_has_configurations_that_fit(rows: int) -> None:
    found = [tiles for tiles in tilings(rows) if fits(tiles, gate=True)]
    assert found
    assert {tiles.prefetch for tiles in found} == {8 if rows == 1 else 1}
    assert all(tiles.block_m >= rows or tiles.block_m == 0 for tiles in found)
