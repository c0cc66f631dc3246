"""Reading GGUF headers that the gguf package wrote, and refusing what is damaged."""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from tandem_wire.gguf_file import GgufError, read_gguf
from tandem_wire.model_config import read_model_facts
from tandem_wire.model_error import BadModelFileError, UnsupportedModelError


def write(
    path: Path,
    architecture: str = "llama",
    scaling: gguf.RopeScalingType | None = None,
    drop: str = "",
) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    sizes = {
        "context_length": writer.add_context_length,
        "embedding_length": writer.add_embedding_length,
        "block_count": writer.add_block_count,
        "feed_forward_length": writer.add_feed_forward_length,
        "head_count": writer.add_head_count,
    }
    for name, add in sizes.items():
        if name != drop:
            add(32)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_token_list(["a", "ß", b"\xff\xfe", "▁the"])
    writer.add_token_scores([0.5, -1.0, 0.0, 2.0])
    writer.add_token_types([1, 1, 6, 1])
    writer.add_eos_token_id(3)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_int64("test.negative", -5)
    if scaling is not None:
        writer.add_rope_scaling_type(scaling)
        writer.add_rope_scaling_factor(4.0)
    if drop != "token_embd":
        writer.add_tensor("token_embd.weight", np.ones((4, 32), np.float32))
    writer.add_tensor("blk.0.attn_q.weight", np.full((32, 32), 7, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_metadata_and_tensors_are_what_was_written(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf")
    file = read_gguf(path)
    assert file.text("general.architecture") == "llama"
    assert file.integer("llama.block_count") == 32
    assert file.number("llama.attention.layer_norm_rms_epsilon") == pytest.approx(1e-5)
    assert file.array("tokenizer.ggml.scores") == [0.5, -1.0, 0.0, 2.0]
    assert file.array("tokenizer.ggml.tokens")[:2] == ["a", "ß"]
    odd = file.array("tokenizer.ggml.tokens")[2]
    assert isinstance(odd, str)
    assert odd.encode("utf-8", "surrogateescape") == b"\xff\xfe"
    assert file.metadata["tokenizer.ggml.add_bos_token"] is True
    assert file.metadata["test.negative"] == -5
    assert (file.text("absent"), file.integer("absent"), file.array("absent")) == ("", None, [])
    query = file.tensors[1]
    assert (query.name, query.shape) == ("blk.0.attn_q.weight", (32, 32))
    assert query.ggml_type == gguf.GGMLQuantizationType.F16
    values = np.fromfile(path, np.float16, 32 * 32, offset=query.offset)
    assert (values == 7).all()


def test_a_value_of_another_kind_is_named(tmp_path: Path) -> None:
    file = read_gguf(write(tmp_path / "a.gguf"))
    for read in (file.integer, file.number, file.array):
        with pytest.raises(GgufError, match=r"general\.architecture"):
            read("general.architecture")
    with pytest.raises(GgufError, match="should be text"):
        file.text("llama.block_count")


def test_facts_from_metadata(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", scaling=gguf.RopeScalingType.LINEAR)
    facts = read_model_facts(path)
    assert (facts.architecture, facts.vocab_size, facts.max_position) == ("llama", 4, 32)
    assert facts.eos_token_ids == (3,)
    assert facts.config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    assert facts.config["tie_word_embeddings"] is True
    assert facts.config["num_key_value_heads"] == 32


def test_yarn_has_the_form_of_a_config(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", scaling=gguf.RopeScalingType.YARN)
    assert read_model_facts(path).config["rope_scaling"] == {"rope_type": "yarn", "factor": 4.0}


def test_what_can_not_be_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="'mamba'"):
        read_model_facts(write(tmp_path / "a.gguf", "mamba"))
    with pytest.raises(UnsupportedModelError, match="'longrope'"):
        read_model_facts(write(tmp_path / "b.gguf", scaling=gguf.RopeScalingType.LONGROPE))
    with pytest.raises(BadModelFileError, match="hidden_size"):
        read_model_facts(write(tmp_path / "c.gguf", drop="embedding_length"))
    with pytest.raises(BadModelFileError, match="token_embd"):
        read_model_facts(write(tmp_path / "d.gguf", drop="token_embd"))
    with pytest.raises(BadModelFileError, match="max_position_embeddings"):
        read_model_facts(write(tmp_path / "e.gguf", drop="context_length"))
    with pytest.raises(BadModelFileError, match="No such file"):
        read_model_facts(tmp_path / "absent.gguf")


def test_every_cut_of_a_header_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf")
    whole = path.read_bytes()
    header = whole.index(b"blk.0.attn_q.weight") + 10
    for size in range(0, header, 7):
        path.write_bytes(whole[:size])
        with pytest.raises(GgufError):
            read_gguf(path)


def test_nonsense_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    for content, words in [
        (b"not a model", "magic"),
        (b"GGUF" + struct.pack("<I", 9), "version 9"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), "larger than the file"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<QI", 0, 99), "value type 99"),
    ]:
        path.write_bytes(content)
        with pytest.raises(GgufError, match=words):
            read_gguf(path)
