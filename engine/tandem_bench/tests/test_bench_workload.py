"""Traces, replays and prompts."""

import gzip
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from tandem_bench.errors import WorkloadError
from tandem_bench.workload.planned import PlannedRequest
from tandem_bench.workload.prompts import FIRST_TOKEN, PromptMaker
from tandem_bench.workload.random_lengths import RandomLengths, plan_random
from tandem_bench.workload.recorded import read_trace
from tandem_bench.workload.replay import ReplayOptions, plan_trace, spread_ties
from tandem_bench.workload.trace_rows import Trace, TraceRow

MOONCAKE = """\
{"timestamp": 0, "input_length": 1300, "output_length": 20, "hash_ids": [0, 1, 2]}
{"timestamp": 0, "input_length": 1100, "output_length": 30, "hash_ids": [0, 1, 3]}
{"timestamp": 3000, "input_length": 700, "output_length": 5, "hash_ids": [0, 4]}
{"timestamp": 6000, "input_length": 512, "output_length": 7, "hash_ids": [9]}
"""
AZURE = """\
TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:50.5951690,10,0
"""
SERVEGEN = """\
client,window_start_s,rate_rps,cv,pattern,shape,scale
0,0,0.5,1.0,Gamma,1.0,2.0
1,0,0.2,2.0,Weibull,0.7,3.0
2,0,9.0,1.0,Gamma,1.0,1.0
0,600,1.0,1.0,Gamma,1.0,1.0
"""
SERVEGEN_LENGTHS = """\
client,window_start_s,field,mean,p5,p25,p50,p75,p90,p95,p99,max
0,0,input_tokens,100,10,50,100,150,180,190,198,200
0,0,output_tokens,10,1,5,10,15,18,19,20,20
1,21600,input_tokens,1000,900,950,1000,1050,1080,1090,1098,1100
1,21600,output_tokens,1,1,1,1,1,1,1,1,1
"""


def write(path: Path, text: str) -> Path:
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def plans(trace: Trace, rate: float | None = None, **options: float) -> list[PlannedRequest]:
    return list(plan_trace(trace, ReplayOptions(**options), rate, seed=3))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["small.jsonl", "small.jsonl.gz"])
def test_mooncake_rows_keep_times_lengths_and_blocks(tmp_path: Path, name: str) -> None:
    trace = read_trace(write(tmp_path / name, MOONCAKE))
    assert (trace.name, trace.block_tokens, trace.span) == ("small", 512, 6.0)
    assert trace.rows[1] == TraceRow(0.0, 1100, 30, (0, 1, 3))


def test_azure_rows_are_sorted_and_empty_answers_left_out(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path / "azure.csv", AZURE))
    assert [row.input_tokens for row in trace.rows] == [374, 396]
    assert trace.span == pytest.approx(4.314579)


def test_servegen_windows_have_their_rates_and_lengths(tmp_path: Path) -> None:
    write(tmp_path / "m_lengths.csv.gz", SERVEGEN_LENGTHS)
    rows = read_trace(write(tmp_path / "m_arrivals.csv.gz", SERVEGEN)).rows
    first = [row for row in rows if row.at < 600]
    # 300 of client 0 and 120 of client 1; client 2 was published without lengths.
    assert len(first) == 420
    assert sum(row.input_tokens > 200 for row in first) == 120
    assert len(rows) - len(first) == pytest.approx(600, abs=2)
    assert all(10 <= row.input_tokens <= 200 or row.input_tokens >= 900 for row in rows)


def test_servegen_without_its_lengths_is_told(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="m_lengths"):
        read_trace(write(tmp_path / "m_arrivals.csv", SERVEGEN))


def test_lengths_alone_need_a_rate(tmp_path: Path) -> None:
    text = (
        "num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio\n30,4,34,7.5\n20,5,25,4\n"
    )
    trace = read_trace(write(tmp_path / "vidur.csv", text))
    with pytest.raises(WorkloadError, match="no arrival times"):
        plans(trace)
    planned = plans(trace, rate=10.0)
    assert [each.input_tokens for each in planned] == [30, 20]
    assert 0 < planned[0].at < planned[1].at


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", '{"timestamp": 1}\n', "\x00\xff"])
def test_what_is_no_trace_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(WorkloadError, match=r"x\.csv"):
        read_trace(write(tmp_path / "x.csv", text))


def test_equal_times_are_spread_within_the_quantum() -> None:
    rows = [TraceRow(at, 1, 1) for at in (0.0, 0.0, 0.0, 3.0, 6.0, 6.0, 100.0)]
    moved = spread_ties(rows, seed=1)
    assert [row.at for row in moved] == sorted(row.at for row in moved)
    assert len({row.at for row in moved}) == 7
    assert all(row.at < 3 for row in moved[:3])
    assert moved[3].at == 3.0
    assert all(6 <= row.at < 9 for row in moved[4:6])  # not until 100
    assert spread_ties(rows, seed=1) == moved


def test_a_replay_is_bent_as_asked(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path / "small.jsonl", MOONCAKE))
    literal = plans(trace, spread=False, speed=2.0, length_scale=0.5, max_output=12)
    assert [each.at for each in literal] == [0, 0, 1.5, 3.0]
    assert [each.input_tokens for each in literal] == [650, 550, 350, 256]
    assert [each.output_tokens for each in literal] == [10, 12, 2, 4]
    assert literal[0].block_tokens == 256
    later = plans(trace, spread=False, start=2.0)
    assert [each.input_tokens for each in later] == [700, 512]
    assert len(plans(trace, sample=0.5)) < 4


def test_prompts_share_what_the_trace_shares(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path / "small.jsonl", MOONCAKE))
    first, second, third, fourth = (
        PromptMaker("ids", 10_000, seed=0).tokens(each) for each in plans(trace, spread=False)
    )
    assert [len(tokens) for tokens in (first, second, third, fourth)] == [1300, 1100, 700, 512]
    assert (first[:1024] == second[:1024]).all()
    assert (first[:512] == third[:512]).all()
    assert (first[1024:1100] != second[1024:]).any()
    assert (first[:512] != fourth).any()
    assert first.min() >= FIRST_TOKEN
    assert first.max() < 10_000


def test_random_requests_keep_to_their_ranges_and_repeat() -> None:
    lengths = RandomLengths(input_range=(10, 20), output_range=(3, 4), prefix_share=0.5)
    planned = list(islice(plan_random(lengths, 5.0, seed=9), 200))
    assert {each.input_tokens for each in planned} == set(range(10, 21))
    assert {each.output_tokens for each in planned} == {3, 4}
    assert planned == list(islice(plan_random(lengths, 5.0, seed=9), 200))
    maker = PromptMaker("ids", 500, seed=9)
    prompts = [maker.tokens(each) for each in planned]
    assert len({tuple(tokens[:5].tolist()) for tokens in prompts}) == 1
    assert len({tuple(tokens.tolist()) for tokens in prompts}) == 200


def test_prefixes_are_as_many_as_asked() -> None:
    lengths = RandomLengths(input_range=(40, 40), prefix_share=1.0, num_prefixes=3)
    maker = PromptMaker("ids", 500, seed=9)
    planned = islice(plan_random(lengths, None, seed=2), 60)
    assert len({tuple(maker.tokens(each).tolist()) for each in planned}) == 3


def test_the_next_run_of_a_sweep_finds_nothing_cached() -> None:
    request = PlannedRequest(0, 0.0, 64, 1, (5,), 32, 32)
    one, next_run, next_call, again = (
        PromptMaker("ids", 500, seed=0, nonce=nonce, salt=salt).tokens(request)
        for nonce, salt in ((7, 0), (7, 1), (8, 0), (7, 0))
    )
    assert (one == again).all()
    for other in (next_run, next_call):
        assert (one[:32] != other[:32]).any()
        assert (one[32:] != other[32:]).any()


def test_text_prompts_have_a_word_for_a_token() -> None:
    text = PromptMaker("text", 500, seed=0).prompt(PlannedRequest(0, 0.0, 17, 1))
    assert isinstance(text, str)
    assert len(text.split()) == 17


def test_a_prompt_never_exceeds_its_length_when_blocks_do() -> None:
    request = PlannedRequest(0, 0.0, 10, 1, (1, 2, 3), 512, 10)
    tokens = PromptMaker("ids", 500, seed=0).tokens(request)
    assert tokens.dtype == np.int32
    assert len(tokens) == 10


@pytest.mark.parametrize(
    "lengths",
    [
        RandomLengths(input_range=(0, 5)),
        RandomLengths(output_range=(9, 5)),
        RandomLengths(prefix_share=1.5),
        RandomLengths(num_prefixes=0),
    ],
)
def test_impossible_lengths_are_refused(lengths: RandomLengths) -> None:
    with pytest.raises(WorkloadError):
        next(plan_random(lengths, 1.0, 0))
