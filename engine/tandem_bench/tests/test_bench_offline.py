"""The engine in process."""

import random

import pytest

from tandem_bench.errors import EngineError, WorkloadError
from tandem_bench.offline.engine_run import OfflineEngine, check_fits, warm_up
from tandem_bench.offline.published import OfflineWorkload
from tandem_engine.config import parse_args
from tandem_engine.mock.runner import load_mock_runner

SMALL = OfflineWorkload(num_seqs=20, input_range=(10, 200), output_range=(5, 60))


def mock_engine(*flags: str, profile: str = "tiny?speed=1000") -> OfflineEngine:
    config = parse_args(["--mock", profile, *flags], {})
    return OfflineEngine(config, load_mock_runner(config))


def test_the_published_workload_is_drawn_token_by_token() -> None:
    sequences = OfflineWorkload().draw(vocab_size=151_936)
    assert len(sequences) == 256
    assert sum(len(prompt) for prompt, _ in sequences) == 142_827
    assert sum(length for _, length in sequences) == 133_966  # as nano-vllm's table says
    small = OfflineWorkload().draw(vocab_size=512)
    assert [(len(prompt), length) for prompt, length in small] == [
        (len(prompt), length) for prompt, length in sequences
    ]
    assert max(max(prompt) for prompt, _ in small) == 511
    assert all(100 <= len(prompt) <= 1024 and max(prompt) <= 10_000 for prompt, _ in sequences)
    assert OfflineWorkload().temperature == 0.6
    # The first prompt, which is what a generator seeded with 0 gives before anything else.
    rng = random.Random(0)
    length = rng.randint(100, 1024)
    assert sequences[0][0] == [rng.randint(0, 10_000) for _ in range(length)]


def test_every_sequence_runs_to_its_last_token() -> None:
    engine = mock_engine()
    sequences = SMALL.draw(512)
    warm_up(engine, SMALL, 512, 3)
    seen: list[tuple[int, int]] = []
    found = engine.run(sequences, 0.6, lambda done, tokens: seen.append((done, tokens)))
    assert found.output_tokens == sum(length for _, length in sequences)
    assert found.input_tokens == sum(len(prompt) for prompt, _ in sequences)
    assert max(length for _, length in sequences) <= found.steps
    assert 1 < found.mean_batch <= 20
    assert 0 < found.runner_share <= 1
    assert found.first_token_seconds < found.seconds
    again = engine.run(sequences, 0.6)
    assert (again.output_tokens, again.num_seqs) == (found.output_tokens, 20)
    assert again.cached_tokens == found.cached_tokens == 0
    engine.close()


def test_preempted_sequences_are_counted_and_finish() -> None:
    engine = mock_engine(profile="tiny?speed=1000&blocks=24")
    found = engine.run(SMALL.draw(512), 0.0)
    assert found.preemptions > 0
    assert found.output_tokens == sum(length for _, length in SMALL.draw(512))


def test_what_does_not_fit_is_told_before_it_runs() -> None:
    engine = mock_engine("--max-model-len", "128")
    with pytest.raises(EngineError, match="260 tokens don't fit"):
        check_fits(SMALL, engine)
    with pytest.raises(EngineError, match="refused a sequence"):
        engine.run([([1] * 200, 50)], 0.0)


def test_impossible_workloads_are_refused() -> None:
    with pytest.raises(WorkloadError):
        OfflineWorkload(input_range=(9, 3)).draw(100)
