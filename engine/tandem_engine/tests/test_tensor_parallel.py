"""A model divided among processes gives the tokens and the pages of an undivided one."""

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from deadlines import patience

from tandem_engine.config import WorkerConfig
from tandem_engine.core.process import CoreProcess
from tandem_engine.errors import ConfigError, RankDiedError
from tandem_engine.frames import CoreFailed, CoreReady
from tandem_engine.load.runner import load_runner
from tandem_engine.models.shard import Shard
from tandem_engine.parallel.messages import PageRequest
from tandem_engine.parallel.rank_process import RankProcess
from tandem_engine.parallel.runner import ParallelRunner
from tandem_engine.startup import Startup
from tandem_engine.step import Batch, Runner
from tandem_engine.tests.step_driver import Blocks, Request, generate, move_prompt, run_sequences
from tandem_engine.tests.test_core_process import GREEDY, collect, first, submit
from tandem_engine.tests.test_model_equality import NUM_TOKENS, PAGE, make_prompt
from tandem_engine.tests.tiny_checkpoints import reference_tokens, save_checkpoint
from tandem_wire.messages import PrefillPeer

LENGTHS = [1, 2, PAGE, 41, 100]
SECONDS = 60.0


def make_config(directory: Path, ranks: int, **flags: Any) -> WorkerConfig:
    return WorkerConfig(
        model=f"file://{directory}",
        device="cpu",
        dtype="Float32",
        page_size=PAGE,
        max_running=16,
        kv_memory_bytes=32 << 20,
        cache_dir=str(directory / "cache"),
        tensor_parallel=ranks,
        **flags,
    )


@contextmanager
def opened(directory: Path, ranks: int, fail: Any = None) -> Iterator[Runner]:
    config = make_config(directory, ranks)
    runner = load_runner(config, Startup(), fail)
    try:
        yield runner
    finally:
        runner.close()


@pytest.mark.parametrize(
    "family", ["llama", "llama3", "qwen2", "qwen3", "gemma3", "qwen2_moe", "deepseek_v3"]
)
def test_two_ranks_give_transformers_tokens(family: str, tmp_path: Path) -> None:
    model = save_checkpoint(family, tmp_path)
    prompts = [make_prompt(length) for length in LENGTHS]
    expected = [reference_tokens(model, prompt, NUM_TOKENS) for prompt in prompts]
    with opened(tmp_path, 2) as runner:
        for chunk, stagger in ((1 << 30, 0), (7, 2)):
            assert generate(runner, prompts, NUM_TOKENS, chunk, stagger) == expected


def test_heads_that_cannot_be_divided_are_refused(tmp_path: Path) -> None:
    save_checkpoint("qwen2", tmp_path)
    with (
        pytest.raises(
            ConfigError, match="--tensor-parallel is 4, but there are 6 query and 2 KV heads"
        ),
        opened(tmp_path, 4),
    ):
        pass


@pytest.mark.parametrize(
    ("count", "ranks", "expected"),
    [
        (8, 2, [range(0, 4), range(4, 8)]),
        (2, 4, [range(0, 1), range(0, 1), range(1, 2), range(1, 2)]),
        (1, 2, [range(0, 1), range(0, 1)]),
    ],
)
def test_ranks_have_heads_side_by_side(count: int, ranks: int, expected: list[range]) -> None:
    assert [Shard(rank, ranks).kv_heads(count) for rank in range(ranks)] == expected


@pytest.mark.parametrize("family", ["qwen3", "deepseek_v3"])
def test_pages_move_between_workers_of_one_and_two_ranks(family: str, tmp_path: Path) -> None:
    """With two heads, of which each rank has one, and with one latent, which both ranks have."""
    model = save_checkpoint(family, tmp_path)
    prompt = make_prompt(70)
    expected = reference_tokens(model, prompt, NUM_TOKENS)
    with opened(tmp_path, 2) as two, opened(tmp_path, 1) as one:
        assert two.kv.layout == one.kv.layout
        for source, target in ((two, one), (one, two)):
            assert move_prompt(source, target, prompt, NUM_TOKENS) == expected
        with pytest.raises(ValueError, match="bytes for pages of"):
            two.kv.import_blocks([0], range(1), memoryview(b"short"))


def test_four_ranks_of_which_two_share_a_head(tmp_path: Path) -> None:
    model = save_checkpoint("llama_eight", tmp_path)
    prompts = [make_prompt(length) for length in LENGTHS]
    expected = [reference_tokens(model, prompt, NUM_TOKENS) for prompt in prompts]
    with opened(tmp_path, 4) as four, opened(tmp_path, 1) as one:
        assert generate(four, prompts, NUM_TOKENS, 7, 2) == expected
        assert four.kv.layout == one.kv.layout
        for source, target in ((four, one), (one, four)):
            assert move_prompt(source, target, prompts[-1], NUM_TOKENS) == expected[-1]


def test_an_import_waits_for_the_steps_before_its_blocks_were_reserved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint("llama", tmp_path)
    asked: list[int] = []
    ask = RankProcess.ask

    def note(process: RankProcess, connection: socket.socket, request: PageRequest) -> None:
        asked.append(request.step)
        ask(process, connection, request)

    with opened(tmp_path, 2) as runner:
        layers = range(runner.kv.layout.num_layers)
        page = memoryview(bytearray(runner.kv.layout.block_bytes))
        generate(runner, [make_prompt(5)], 3)
        runner.kv.reserve([7])
        generate(runner, [make_prompt(5)], 2)
        monkeypatch.setattr(RankProcess, "ask", note)
        for block in (7, 8):
            runner.kv.import_blocks([block], layers, page)
    assert asked == [3, 5]


def test_a_cached_prefix_and_a_copied_block(tmp_path: Path) -> None:
    model = save_checkpoint("llama", tmp_path)
    shared = make_prompt(3 * PAGE + 5)
    with opened(tmp_path, 2) as runner:
        blocks = Blocks(runner, PAGE)
        first = Request(shared, blocks.take(len(shared) + NUM_TOKENS))
        run_sequences(runner, [first], NUM_TOKENS, chunk=20)
        prompt = shared + make_prompt(9)
        own = blocks.take(len(prompt) + NUM_TOKENS - 3 * PAGE)
        runner.execute(Batch([], copies=[(first.blocks[3], own[0])]))
        request = Request(prompt, first.blocks[:3] + own, num_computed=len(shared))
        found = run_sequences(runner, [request], NUM_TOKENS, chunk=16)[0]
    assert found == reference_tokens(model, prompt, NUM_TOKENS)


def test_a_killed_rank_ends_the_worker_with_an_account(tmp_path: Path) -> None:
    save_checkpoint("llama", tmp_path)
    failed = threading.Event()
    accounts: list[str] = []

    def fail(message: str) -> None:
        accounts.append(message)
        failed.set()

    with opened(tmp_path, 2, fail) as runner:
        assert isinstance(runner, ParallelRunner)
        generate(runner, [make_prompt(5)], 2)
        os.kill(runner.group.ranks[0].pid, signal.SIGKILL)
        # No step is running: the group itself notices.
        assert failed.wait(patience(SECONDS))
        assert "rank 1 of 2 ended (signal 9)" in accounts[0]
        with pytest.raises(RankDiedError, match="signal 9"):
            generate(runner, [make_prompt(5)], 2)


async def test_a_rank_that_cannot_start_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint("llama", tmp_path)
    broken = tmp_path / "path" / "safetensors"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text(
        "import sys\n"
        "assert not sys.argv[0].endswith('member.py'), 'nothing works here'\n"
        "__path__ = [p + '/safetensors' for p in sys.path if 'site-packages' in p]\n"
        "from safetensors._safetensors_rust import *\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(broken.parent))
    config = make_config(tmp_path, 2, host="127.0.0.1", bootstrap_port=0)
    core = await CoreProcess.spawn(config.resolve_auto({}))
    failed = await first(core, CoreFailed)
    assert "rank 1 of 2 ended (exit code 1)" in failed.message
    assert "nothing works here" in failed.message
    await core.close()


def test_a_rank_that_fails_to_load_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails after the ranks have met, with a library that would wait at exit."""
    save_checkpoint("llama", tmp_path)
    site = tmp_path / "path" / "sitecustomize.py"
    site.parent.mkdir()
    site.write_text(
        "import atexit, sys, threading\n"
        "if 'tandem_engine.load.member' in sys.orig_argv:\n"
        "    from tandem_engine.weights import loading\n"
        "    def fail(*arguments, **options): raise MemoryError('no room for these weights')\n"
        "    loading.load_parameters = fail\n"
        "    atexit.register(threading.Event().wait)\n"
    )
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", str(site.parent))
        with (
            pytest.raises(RankDiedError, match=r"rank 1 of 2 ended \(exit code 1\)") as failed,
            opened(tmp_path, 2),
        ):
            pass
    assert "MemoryError: no room for these weights" in str(failed.value)
    with opened(tmp_path, 2) as runner:  # this process can still be the first of others
        assert len(generate(runner, [make_prompt(5)], 2)[0]) == 2


def child_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


async def test_workers_of_one_and_two_ranks_hand_a_prompt_over(tmp_path: Path) -> None:
    """Two core processes with the real hand-off. Then a rank of one of them dies."""
    model = save_checkpoint("llama", tmp_path)
    flags: dict[str, Any] = {"host": "127.0.0.1", "bootstrap_port": 0, "local_prefill_tokens": 16}
    decode, prefill = [
        await CoreProcess.spawn(
            make_config(tmp_path, ranks, **flags).resolve_auto({"POD_NAME": name})
        )
        for name, ranks in (("d", 1), ("p", 2))
    ]
    try:
        ready = await first(prefill, CoreReady)
        assert (await first(decode, CoreReady)).compatibility_hash == ready.compatibility_hash
        prompt = make_prompt(100)
        peer = PrefillPeer("p", "127.0.0.1", ready.bootstrap_port)
        decode.send(submit("r", prompt, peer))
        items = await collect(decode, "r")
        expected = reference_tokens(model, prompt, GREEDY.max_tokens)
        assert [token for item in items for token in item.tokens] == expected[: len(items)]
        assert items[0].prefill_worker == "p"
        os.kill(child_of(prefill.pid), signal.SIGKILL)
        failed = await first(prefill, CoreFailed)
        assert "rank 1 of 2 ended (signal 9)" in failed.message
    finally:
        await decode.close()
        await prefill.close()
