"""The mock runner: same tokens everywhere, no corruption hidden, time as the profile says."""

import pytest

from tandem_engine.config import WorkerConfig
from tandem_engine.errors import ConfigError, CorruptKVError
from tandem_engine.mock.latency import PROFILES, parse_profile
from tandem_engine.mock.runner import EOS_TOKEN, MockRunner, load_mock_runner
from tandem_engine.step import Batch, BatchItem
from tandem_wire.messages import SamplingParams

GREEDY = SamplingParams(max_tokens=8, temperature=0.0)


def make_runner(profile: str = "tiny?blocks=16") -> MockRunner:
    return MockRunner(parse_profile(profile), page_size=4)


def item(
    tokens: list[int],
    start: int,
    end: int,
    table: list[int],
    *,
    rid: str = "r",
    num_prompt: int | None = None,
    params: SamplingParams = GREEDY,
) -> BatchItem:
    num_prompt = len(tokens) if num_prompt is None else num_prompt
    return BatchItem(
        rid=rid,
        tokens=tokens[start:end],
        start=start,
        block_table=table,
        sample=end == len(tokens),
        params=params,
        prompt_tokens=tokens[:num_prompt],
        output_tokens=tokens[num_prompt:],
    )


def run_one(runner: MockRunner, one: BatchItem) -> int:
    (result,) = runner.execute(Batch([one]))
    if result is None:
        return -1
    (token,) = result.tokens
    return token


def test_chunks_make_no_difference() -> None:
    tokens = list(range(40, 53))
    whole = run_one(make_runner(), item(tokens, 0, 13, [0, 1, 2, 3]))
    runner = make_runner()
    assert run_one(runner, item(tokens, 0, 5, [3, 2, 1, 0])) == -1
    assert run_one(runner, item(tokens, 5, 13, [3, 2, 1, 0])) == whole
    assert 32 <= whole < 127


def test_pages_from_elsewhere_are_verified_and_used() -> None:
    tokens = list(range(40, 50))
    prefill, decode = make_runner(), make_runner()
    first = run_one(prefill, item(tokens, 0, 10, [5, 6, 7]))
    layers = range(2)
    data = prefill.kv.export_blocks([5, 6, 7], layers)
    decode.kv.import_blocks([1, 2, 3], layers, memoryview(data))
    after = [*tokens, first]
    second = run_one(decode, item(after, 10, 11, [1, 2, 3], num_prompt=10))
    assert second == run_one(prefill, item(after, 10, 11, [5, 6, 7], num_prompt=10))


def test_layers_can_move_one_by_one_and_sizes_are_checked() -> None:
    runner = make_runner()
    run_one(runner, item([40, 41, 42], 0, 3, [0]))
    parts = [bytes(runner.kv.export_blocks([0], range(i, i + 1))) for i in range(2)]
    assert b"".join(parts) == bytes(runner.kv.export_blocks([0], range(2)))
    for layer, part in enumerate(parts):
        runner.kv.import_blocks([9], range(layer, layer + 1), memoryview(part))
    assert runner.kv.export_blocks([9], range(2)) == runner.kv.export_blocks([0], range(2))
    with pytest.raises(ValueError, match="expected"):
        runner.kv.import_blocks([9], range(2), memoryview(b"123"))


@pytest.mark.parametrize("fresh", [True, False])
def test_stale_pages_are_an_error(fresh: bool) -> None:
    tokens = list(range(40, 50))
    runner = make_runner()
    run_one(runner, item(tokens, 0, 10, [0, 1, 2]))
    runner.kv.import_blocks([2], range(2), memoryview(runner.kv.export_blocks([1], range(2))))
    rid = "other" if fresh else "r"
    with pytest.raises(CorruptKVError, match=rid):
        run_one(runner, item([*tokens, 40], 10, 11, [0, 1, 2], rid=rid, num_prompt=10))


def test_wrong_page_under_a_known_sequence_is_noticed_in_a_chunk() -> None:
    tokens = list(range(40, 52))
    runner = make_runner()
    run_one(runner, item(tokens, 0, 6, [0, 1, 2]))
    with pytest.raises(CorruptKVError):
        run_one(runner, item(tokens, 6, 12, [0, 5, 2]))


def test_copies_come_first() -> None:
    tokens = list(range(40, 47))
    runner = make_runner()
    expected = run_one(runner, item(tokens, 0, 7, [0, 1]))
    copy = item(tokens, 6, 7, [0, 3], rid="copy")
    (result,) = runner.execute(Batch([copy], copies=[(1, 3)]))
    assert result is not None
    assert result.tokens == [expected]


def test_seed_and_position_matter_only_when_sampling() -> None:
    tokens = [40, 41, 42]
    by_seed = {
        (temperature, seed): run_one(
            make_runner(),
            item(
                tokens,
                0,
                3,
                [0],
                params=SamplingParams(max_tokens=1, temperature=temperature, seed=seed),
            ),
        )
        for temperature in (0.0, 1.0)
        for seed in range(8)
    }
    assert len({by_seed[0.0, seed] for seed in range(8)}) == 1
    assert len({by_seed[1.0, seed] for seed in range(8)}) > 1


def test_eos_only_where_the_profile_and_the_request_allow() -> None:
    tokens = [40, 41, 42]
    runner = make_runner("tiny?blocks=16&eos=1")
    assert run_one(runner, item(tokens, 0, 3, [0])) == EOS_TOKEN
    ignoring = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    assert run_one(runner, item(tokens, 0, 3, [0], params=ignoring)) != EOS_TOKEN
    later = SamplingParams(max_tokens=5, temperature=0.0, min_tokens=1)
    assert run_one(runner, item(tokens, 0, 3, [0], params=later)) != EOS_TOKEN


def test_logprobs_come_when_asked_for() -> None:
    params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=3)
    (result,) = make_runner().execute(Batch([item([40, 41], 0, 2, [0], params=params)]))
    assert result is not None
    assert result.logprobs is not None
    (logprobs,) = result.logprobs
    assert logprobs.top_ids[:1] == result.tokens
    assert len(logprobs.top_ids) == len(logprobs.top_logprobs) == 3


def test_fitted_profile_is_close_to_the_measured_figures() -> None:
    profile = PROFILES["h100-8b"]
    decodes = {(1, 1024): 6.46, (32, 1024): 8.22, (128, 1024): 13.54, (256, 1024): 20.7}
    decodes |= {(32, 8192): 17.9, (1, 32768): 7.95}
    for (batch, context), milliseconds in decodes.items():
        assert profile.step_seconds([context] * batch, []) * 1e3 == pytest.approx(
            milliseconds, rel=0.03
        )
    for length, seconds in {1024: 0.0269, 8192: 0.2113, 32768: 1.182}.items():
        assert profile.step_seconds([], [(0, length)]) == pytest.approx(seconds, rel=0.03)


def test_a_step_sleeps_for_the_rest_of_its_time() -> None:
    slept: list[float] = []
    profile = parse_profile("h100-8b?speed=2&prefill_ms=100")
    runner = MockRunner(profile, page_size=4, sleep=slept.append)
    run_one(runner, item(list(range(40, 44)), 0, 4, [0]))
    assert 0 < slept[0] <= 0.05
    assert parse_profile("tiny?decode_ms=5").step_seconds([10, 20], []) == 0.005


@pytest.mark.parametrize(
    "text",
    [
        "huge",
        "tiny?nonsense=1",
        "tiny?speed=fast",
        "tiny?speed=0",
        "tiny?vocab=100",
        "tiny?blocks=0",
    ],
)
def test_bad_profiles_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--mock"):
        parse_profile(text)


def test_limits_come_from_the_flags() -> None:
    config = WorkerConfig(model="mock://tiny?max_len=100", max_model_len=50, page_size=16)
    runner = load_mock_runner(config)
    assert runner.max_model_len == 50
    assert runner.kv.layout.page_size == 16
