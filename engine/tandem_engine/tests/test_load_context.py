"""What is decided before anything of a model is loaded."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tandem_engine.config import WorkerConfig
from tandem_engine.errors import ConfigError
from tandem_engine.load.context import LoadContext, open_context
from tandem_engine.load.files import find_files
from tandem_engine.parallel.messages import RankStart
from tandem_engine.startup import Startup
from tandem_engine.tests.tiny_checkpoints import save_checkpoint
from tandem_wire.model_config import read_model_facts


def make_context(directory: Path, family: str = "llama", **flags: Any) -> LoadContext:
    save_checkpoint(family, directory)
    config = WorkerConfig(model=f"file://{directory}", device="cpu", page_size=16, **flags)
    files = find_files(config, Startup())
    facts = read_model_facts(files.path)
    return open_context(RankStart(config, 0, ""), files, facts, Startup())


@pytest.mark.parametrize("module", ["runner", "ranks", "member"])
def test_what_the_core_imports_first_is_free_of_torch(module: str) -> None:
    """Several ranks import torch at the same time, and a download doesn't wait for it."""
    code = f"import sys, tandem_engine.load.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_one_rank_has_the_whole_model(tmp_path: Path) -> None:
    context = make_context(tmp_path, kv_memory_bytes=1 << 20)
    assert context.spec == context.model
    assert context.collective.is_alone
    assert (context.device, context.dtype) == (torch.device("cpu"), torch.float32)
    assert (context.kv_layout.num_kv_heads, context.kv_layout.num_planes) == (2, 2)


def test_pages_of_latents_have_one_plane(tmp_path: Path) -> None:
    layout = make_context(tmp_path, "deepseek_v3", dtype="BFloat16").kv_layout
    assert (layout.num_planes, layout.num_kv_heads, layout.head_dim) == (1, 1, 24 + 8)
    assert (layout.dtype, layout.itemsize) == ("bfloat16", 2)


def test_the_longest_sequence_fits_into_the_cache(tmp_path: Path) -> None:
    context = make_context(tmp_path)
    assert context.fit_length(10, "--kv-memory") == 160
    assert context.fit_length(10_000, "--kv-memory") == 4096
    with pytest.raises(ConfigError, match="leaves KV for 0 tokens, less than a page of 16; raise"):
        context.fit_length(0, "--gpu-memory-percent")
    limited = make_context(tmp_path, max_model_len=100)
    assert limited.fit_length(10, "--kv-memory") == 100
    with pytest.raises(ConfigError, match="--kv-memory leaves KV for 96 tokens, but --max-model-"):
        limited.fit_length(6, "--kv-memory")
