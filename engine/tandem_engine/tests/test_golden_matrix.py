"""Prompts handed over between workers of unequal tensor parallelism give transformers' tokens.

Each pair goes through the real hand-off over each transport; the ranks are processes with gloo, of
which a process can lead one group: so one side of a pair has one rank. All pages look alike.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import pytest

from tandem_engine.handoff.events import FetchDone, FetchRequest, PrefillArrived, PushChunk
from tandem_engine.handoff.service import HandoffService, start_handoff
from tandem_engine.handoff.tests.scripted import FAST, eventually
from tandem_engine.handoff.tests.transport_list import LIBRARIES
from tandem_engine.step import Runner
from tandem_engine.tests.step_driver import GREEDY, Blocks, Request, run_sequences
from tandem_engine.tests.test_model_equality import NUM_TOKENS, make_prompt
from tandem_engine.tests.test_tensor_parallel import opened
from tandem_engine.tests.tiny_checkpoints import reference_tokens, save_checkpoint
from tandem_wire.handoff import KVLayout, TransportName
from tandem_wire.messages import PrefillPeer

E = TypeVar("E")
DIVIDED = [
    ("llama_eight", 2),
    ("llama_eight", 4),  # two KV heads: two ranks have the same one
    ("deepseek_v3", 2),  # latents, which every rank has
    ("gemma3", 2),  # layers with a window
]
OVER_HOST_MEMORY: list[TransportName] = ["tcp", "shm", *LIBRARIES]


@dataclass
class Family:
    """An undivided and a divided runner of one model, and what transformers says."""

    one: Runner
    many: Runner
    prompts: list[list[int]]
    expected: list[list[int]]


@pytest.fixture(
    name="family",
    scope="module",
    params=DIVIDED,
    ids=[f"{name}-{ranks}" for name, ranks in DIVIDED],
)
def family_fixture(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Family]:
    name, ranks = request.param
    directory = tmp_path_factory.mktemp(name)
    model = save_checkpoint(name, directory)
    prompts = [make_prompt(length) for length in (70, 100)]
    expected = [reference_tokens(model, prompt, NUM_TOKENS) for prompt in prompts]
    with opened(directory, ranks) as many, opened(directory, 1) as one:
        yield Family(one, many, prompts, expected)


@pytest.mark.parametrize("transport", OVER_HOST_MEMORY)
def test_unequal_ranks_hand_prompts_over(
    family: Family, transport: TransportName, tmp_path: Path
) -> None:
    assert family.one.kv.layout == family.many.kv.layout
    for prefill, decode in ((family.one, family.many), (family.many, family.one)):
        with ExitStack() as stack:
            p = start(stack, "p", prefill, transport, tmp_path)
            d = start(stack, "d", decode, transport, tmp_path)
            for prompt, expected in zip(family.prompts, family.expected, strict=True):
                assert hand_over(p, d, prefill, decode, prompt) == expected


def start(
    stack: ExitStack, name: str, runner: Runner, transport: TransportName, directory: Path
) -> HandoffService:
    # Writes of two layers of one block, so that a prompt is many of them.
    write_bytes = 2 * runner.kv.layout.layer_bytes
    settings = replace(
        FAST,
        worker_id=name,
        transport=transport,
        shm_dir=str(directory),
        write_bytes=write_bytes,
        shm_ring_bytes=4 * write_bytes,
    )
    handoff = start_handoff(settings, runner.kv, "same")
    stack.callback(handoff.close)
    return handoff


def hand_over(
    p: HandoffService, d: HandoffService, prefill: Runner, decode: Runner, prompt: list[int]
) -> list[int]:
    """Greedy tokens of `decode` for a prompt whose pages `prefill` computed."""
    page = prefill.kv.layout.page_size
    source = Request(prompt, Blocks(prefill, page, seed=1).take(len(prompt)))
    target = Request(prompt, Blocks(decode, page, seed=2).take(len(prompt) + NUM_TOKENS))
    wanted = target.blocks[: len(source.blocks)]
    decode.kv.reserve(wanted)
    d.post(
        FetchRequest(
            rid="r",
            tokens=tuple(prompt),
            num_prompt_tokens=len(prompt),
            num_skip_tokens=0,
            blocks=tuple(wanted),
            params=GREEDY,
            peers=(PrefillPeer("p", "127.0.0.1", p.bootstrap_port),),
        )
    )
    asked = reported(p, PrefillArrived)
    first = run_sequences(prefill, [source], 1, chunk=32)[0]
    half = len(source.blocks) // 2
    chunks = [
        PushChunk(asked.key, 0, half * page, tuple(source.blocks[:half]), last=False),
        PushChunk(
            asked.key,
            half * page,
            len(prompt),
            tuple(source.blocks[half:]),
            last=True,
            first_token=first[0],
        ),
    ]
    for chunk in chunks:
        p.post(chunk)
    done = reported(d, FetchDone)
    assert done.num_bytes == expected_bytes(decode.kv.layout, len(prompt))
    target.outputs, target.num_computed = [done.first_token], len(prompt)
    return run_sequences(decode, [target], NUM_TOKENS, chunk=32)[0]


def expected_bytes(layout: KVLayout, num_tokens: int) -> int:
    """Every layer of every block; but of layers with a window, only what holds their last tokens.

    That is what the first query of the last block sees, which is never less than what decoding
    sees.
    """
    page = layout.page_size
    num_blocks = -(-num_tokens // page)
    total = 0
    for window in layout.windows or (0,) * layout.num_layers:
        oldest = max(0, (num_blocks - 1) * page - window + 1) if window else 0
        total += num_blocks - oldest // page
    return total * layout.layer_bytes


def reported(handoff: HandoffService, kind: type[E]) -> E:
    found: list[E] = []

    def arrived() -> bool:
        found.extend(event for event in handoff.poll() if isinstance(event, kind))
        return bool(found)

    eventually(arrived)
    return found[0]
