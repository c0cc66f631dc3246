"""Layers with a window: only the window travels, and no one computes with what didn't come.

The mock compares the KV of a sequence's tokens whenever it meets them, in layers with a window as
far as that reaches; so a wrong reuse is a CorruptKVError.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from tandem_engine.core.engine_core import EngineCore
from tandem_engine.frames import CoreStep, FromCore, RoutedSubmit, SetMode
from tandem_engine.handoff.events import FetchRequest, PushChunk
from tandem_engine.handoff.service import HandoffService, start_handoff
from tandem_engine.handoff.tests.scripted import FAST, eventually
from tandem_engine.handoff.tests.transport_list import LIBRARIES
from tandem_engine.step import Runner
from tandem_engine.tests.fleet import Fleet, assert_clean, expected_tokens, posted, prompt
from tandem_engine.tests.loopback import Network
from tandem_engine.tests.test_golden_matrix import expected_bytes
from tandem_engine.tests.test_model_equality import NUM_TOKENS, make_prompt
from tandem_engine.tests.test_tensor_parallel import make_config, opened
from tandem_engine.tests.tiny_checkpoints import reference_tokens, save_checkpoint
from tandem_wire.handoff import TransportName
from tandem_wire.messages import PrefillPeer, SamplingParams, Submit

PAGE, WINDOW = 8, 20
GREEDY = SamplingParams(max_tokens=8, temperature=0.0)


def make_fleet(*names: str, network: Network | None = None) -> Fleet:
    model = f"mock://tiny?blocks=64&max_len=400&window={WINDOW}"
    return Fleet(*names, model=model, network=network)


def ask(fleet: Fleet, rid: str, tokens: list[int], *, at: str = "d") -> None:
    """Have a prompt answered at `at`, with p as its prefill worker, and check the answer."""
    fleet[at].submit(rid, tokens, peers=() if at == "p" else ("p",))
    fleet.settle()
    assert fleet[at].streams[rid].tokens == expected_tokens(tokens, GREEDY, len(tokens))
    assert_clean(fleet)


def fetches(fleet: Fleet) -> list[tuple[int, int]]:
    """Tokens that D left out of each of its fetches, and tokens of the whole."""
    found = posted(fleet, "d", FetchRequest)
    return [(fetch.num_skip_tokens, len(fetch.tokens)) for fetch in found]


def test_a_prompt_that_comes_again_is_computed_by_the_decode_worker_itself() -> None:
    for length in (96, 97, 100, 103, 104):
        fleet = make_fleet("p", "d")
        ask(fleet, "a", prompt(length))
        ask(fleet, "b", prompt(length))
        assert fetches(fleet) == [(0, length)]
        hits = fleet["d"].stats().counters["prefix_hit_tokens_total"]
        assert hits >= (length - 1) // PAGE * PAGE


def test_a_prompt_that_goes_on_asks_for_the_rest_only() -> None:
    fleet = make_fleet("p", "d")
    ask(fleet, "a", prompt(100))
    answer = fleet["d"].streams["a"].tokens
    ask(fleet, "b", [*prompt(100), *answer, *prompt(60, start=5)])
    # The last token of the answer was never computed.
    assert fetches(fleet) == [(0, 100), (107 // PAGE * PAGE, 168)]


def test_a_part_of_a_prompt_serves_a_fetch_that_reaches_over_the_window() -> None:
    fleet = make_fleet("p", "d")
    ask(fleet, "a", prompt(150))
    ask(fleet, "far", [*prompt(64), *prompt(60, start=5)])
    ask(fleet, "near", [*prompt(32), *prompt(19, start=9)])
    skipped = [skip for skip, _ in fetches(fleet)]
    # Of the last one the window begins in block 3, and the layers with a window never came of it.
    assert skipped == [0, 64, (48 - WINDOW + 1) // PAGE * PAGE]
    assert_clean(fleet)


def test_a_part_of_a_prompt_serves_no_computing_of_its_own() -> None:
    """Also not as the source of a copy for the tokens of a block that is shared in part."""
    fleet = make_fleet("p", "d")
    ask(fleet, "a", prompt(150))
    before = fleet["d"].stats().counters["prefix_hit_tokens_total"]
    ask(fleet, "b", prompt(14))
    assert len(fetches(fleet)) == 1
    assert fleet["d"].stats().counters["prefix_hit_tokens_total"] == before


def test_a_failed_fetch_starts_over_where_computing_can() -> None:
    fleet = make_fleet("p", "d")
    ask(fleet, "a", prompt(150))
    del fleet.network.handoffs["p"]
    ask(fleet, "b", [*prompt(64), *prompt(60, start=5)])
    assert fetches(fleet)[-1] == (64, 124)
    # Computed from its start, it is whole now, and another one may go on from any of it.
    before = fleet["d"].stats().counters["prefix_hit_tokens_total"]
    ask(fleet, "c", [*prompt(64), *prompt(10, start=9)])
    assert len(fetches(fleet)) == 2
    assert fleet["d"].stats().counters["prefix_hit_tokens_total"] - before >= 64
    assert fleet["d"].streams["b"].items[0].num_cached_tokens == 0


def test_a_decode_worker_that_becomes_a_prefill_worker_computes_what_it_lacks() -> None:
    fleet = make_fleet("p", "d", "other")
    ask(fleet, "a", prompt(150))
    fleet["d"].core.post(SetMode(role="prefill"))
    tokens = [*prompt(64), *prompt(60, start=5)]
    fleet["other"].submit("b", tokens, peers=("d",))
    fleet.settle()
    assert fleet["other"].streams["b"].tokens == expected_tokens(tokens, GREEDY, len(tokens))
    assert [(chunk.start, chunk.end) for chunk in posted(fleet, "d", PushChunk)][-1][1] == 124
    assert_clean(fleet)


# --- real models, real transports -----------------------------------------------------------------


@dataclass
class Served:
    """A core with a real model and a real hand-off; its streams by rid."""

    core: EngineCore
    handoff: HandoffService
    frames: list[FromCore]
    tokens: dict[str, list[int]] = field(default_factory=dict)

    def step(self) -> None:
        for _ in range(20):
            self.core.run_once()
        for frame in self.frames:
            for routed in frame.routed if isinstance(frame, CoreStep) else ():
                for item in routed.items:
                    self.tokens.setdefault(item.rid, []).extend(item.tokens)
        self.frames.clear()

    def num_bytes(self, direction: str) -> int:
        """Payload that the transports have counted."""
        totals = self.handoff.counters().items()
        return int(sum(value for name, value in totals if f'direction="{direction}"' in name))


@contextmanager
def served(
    name: str, runner: Runner, directory: Path, transport: TransportName
) -> Iterator[Served]:
    config = make_config(directory, 1, local_prefill_tokens=0, chunk_tokens=32)
    settings = replace(FAST, worker_id=name, transport=transport, shm_dir=str(directory))
    # A machine that stands still for a while must not look like a dead peer.
    settings = replace(settings, heartbeat_seconds=20.0, lease_seconds=60.0, stall_seconds=60.0)
    settings = replace(settings, write_bytes=1 << 16, shm_ring_bytes=1 << 19)
    handoff = start_handoff(settings, runner.kv, "same")
    try:
        frames: list[FromCore] = []
        core = EngineCore(config.resolve_auto({"POD_NAME": name}), runner, handoff, frames.append)
        yield Served(core, handoff, frames)
    finally:
        handoff.close()


@pytest.fixture(name="gemma", scope="module")
def gemma_fixture(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[PreTrainedModel, Path, Runner, Runner]]:
    directory = tmp_path_factory.mktemp("gemma3")
    model = save_checkpoint("gemma3", directory)
    with opened(directory, 1) as one, opened(directory, 1) as other:
        yield model, directory, one, other


@pytest.mark.parametrize("transport", ["tcp", "shm", *LIBRARIES])
def test_the_bytes_of_a_prompt_of_many_windows_fall(
    gemma: tuple[PreTrainedModel, Path, Runner, Runner], transport: TransportName
) -> None:
    model, directory, *runners = gemma
    layout = runners[0].kv.layout
    assert Counter(layout.windows) == {24: 6, 0: 1}
    with ExitStack() as stack:
        p, d = (
            stack.enter_context(served(name, runner, directory, transport))
            for name, runner in zip("pd", runners, strict=True)
        )
        first = make_prompt(300)
        shared = first[:160]
        prompts = {"first": first, "shares": [*shared, *make_prompt(90, seed=1)], "again": first}
        for rid, tokens in prompts.items():
            before = d.num_bytes("in")
            answer = answered(p, d, rid, tokens)
            assert answer == reference_tokens(model, tokens, NUM_TOKENS), rid
            moved = d.num_bytes("in") - before
            if rid == "first":
                assert moved == expected_bytes(layout, len(tokens))
                whole = -(-len(tokens) // layout.page_size) * layout.block_bytes
                assert moved < 0.3 * whole  # 19 blocks of one layer, 3 of six: 37 of 133 pages
            elif rid == "shares":
                # The layers that see everything leave the shared blocks out; the others never need
                # them.
                skipped = len(shared) // layout.page_size * layout.layer_bytes
                assert moved == expected_bytes(layout, len(tokens)) - skipped
            else:
                # One token is always computed: by P, because D's threshold is 0.
                assert moved == layout.block_bytes
        eventually(lambda: p.num_bytes("out") == d.num_bytes("in"))
    assert p.handoff.num_leases() == d.handoff.num_leases() == 0


def answered(p: Served, d: Served, rid: str, tokens: list[int]) -> list[int]:
    peer = PrefillPeer("p", "127.0.0.1", p.handoff.bootstrap_port)
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    submit = Submit(
        rid=rid, tokens=tokens, num_prompt_tokens=len(tokens), params=params, prefill=[peer]
    )
    d.core.post(RoutedSubmit(1, submit))

    def has_ended() -> bool:
        p.step()
        d.step()
        return len(d.tokens.get(rid, ())) >= NUM_TOKENS and not p.handoff.num_leases()

    eventually(has_ended)
    return d.tokens[rid]
