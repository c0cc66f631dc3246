"""Logprobs and counts: one entry per token of the answer, each with what the worker reported."""

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem_router.tests.fake_worker import EOS, FakeWorker, saying
from tandem_router.tests.harness import Running, router, text_of
from tandem_router.tests.test_router_text import byte_level
from tandem_router.text.chat_template import ChatTemplate
from tandem_router.text.model import TextModel
from tandem_router.text.stop import StopMatcher
from tandem_router.text.tokenizer import HFTokenizer

CHAT = {"model": "mock", "messages": [{"role": "user", "content": "hi"}]}
SILENT = 300  # a token without text


async def chat_entries(running: Running, **fields: Any) -> tuple[list[Any], dict[str, Any]]:
    """Entries of a chat, which must be the same whole and streamed, and the whole answer."""
    body = {**CHAT, "logprobs": True, "seed": 1, **fields}
    whole = (await running.post("/v1/chat/completions", **body)).json()
    content = whole["choices"][0]["logprobs"]["content"]
    events = await running.events("/v1/chat/completions", **body)
    streamed = [e["choices"][0]["logprobs"]["content"] for e in events]
    assert [entry for entries in streamed for entry in entries] == content
    return content, whole


@pytest.mark.parametrize("stop", [None, "zzz", ["cd"], "never"])
@pytest.mark.parametrize("tokens_per_step", [1, 3, 50])
@pytest.mark.parametrize("end", [EOS, ord("!")])
async def test_every_token_that_counts_has_an_entry(
    stop: Any, tokens_per_step: int, end: int
) -> None:
    worker = FakeWorker(script=lambda _, at: [*b"ab", SILENT, *b"c", SILENT, *b"de", end][at])
    worker.tokens_per_step = tokens_per_step
    async with router(worker) as running:
        fields = {"stop": stop, "stop_token_ids": [ord("!")], "max_tokens": 50}
        content, whole = await chat_entries(running, **fields, return_token_ids=True)
        choice, count = whole["choices"][0], whole["usage"]["completion_tokens"]
        # The stop string spans a token without text and is complete with "d", the sixth token.
        assert count == (6 if stop == ["cd"] else 8)
        assert len(content) == len(choice["token_ids"]) == count
        assert choice["message"]["content"] == ("ab" if stop == ["cd"] else "abcde")
        assert choice["finish_reason"] == "stop"
        if stop != ["cd"]:
            assert content[-1]["token"] == ("!" if end == ord("!") else "<eos>")
            assert content[2]["token"] == f"<{SILENT}>"
        body = {"model": "mock", "prompt": "x", "logprobs": 0, **fields}
        whole = (await running.post("/v1/completions", **body)).json()
        assert whole["usage"]["completion_tokens"] == count
        logprobs = whole["choices"][0]["logprobs"]
        assert {len(column) for column in logprobs.values()} == {count}
        assert all(a <= b for a, b in pairwise(logprobs["text_offset"]))
        events = await running.events("/v1/completions", **body)
        tokens = [t for event in events for t in event["choices"][0]["logprobs"]["tokens"]]
        assert tokens == logprobs["tokens"]


async def test_a_chunk_without_tokens_has_empty_logprobs_rather_than_none() -> None:
    async with router(FakeWorker(script=saying("ab"))) as running:
        body = {**CHAT, "logprobs": True, "max_tokens": 1}
        events = await running.events("/v1/chat/completions", **body)
        assert events[0]["choices"][0]["logprobs"] == {"content": []}
        events = await running.events("/v1/completions", model="mock", prompt="x", max_tokens=2)
        assert {event["choices"][0]["logprobs"] for event in events} == {None}


def bytes_of(label: str) -> bytes:
    """What a label of completions' logprobs stands for."""
    hexed = label.removeprefix("bytes:")
    return bytes.fromhex(hexed.replace("\\x", "")) if hexed != label else label.encode()


@pytest.mark.parametrize("k", [0, 1, 3, 5])
async def test_alternatives_that_decode_alike_stay_apart(k: int) -> None:
    """Half characters: all of them decode to U+FFFD."""
    worker = FakeWorker(script=saying("€"))
    worker.likely = {0xE2: -2.5, 0xC3: -1.0, 0xF0: -1.5, 0x82: -2.0, 0xAC: -3.0, EOS: -4.0}
    async with router(worker) as running:
        body = {"model": "mock", "prompt": "x", "logprobs": k}
        choice = (await running.post("/v1/completions", **body)).json()["choices"][0]
        logprobs = choice["logprobs"]
        ranked = sorted(worker.likely.items(), key=lambda entry: -entry[1])
        assert logprobs["tokens"] == ["bytes:\\xe2", "bytes:\\x82", "bytes:\\xac", "<eos>"]
        for token, label, value, top in zip(
            [0xE2, 0x82, 0xAC, EOS],
            *(logprobs[name] for name in ("tokens", "token_logprobs", "top_logprobs")),
            strict=True,
        ):
            expected = dict(ranked[:k]) | {token: worker.likely[token]}
            assert len(top) == len(expected)
            assert top[label] == value == worker.likely[token]
            assert sorted(top.values()) == sorted(expected.values())
            known = {bytes([key]) if key < 256 else b"<eos>" for key in expected}
            assert {bytes_of(other) for other in top} == known


async def test_alternatives_on_a_byte_level_vocabulary() -> None:
    tokenizer = HFTokenizer(byte_level(), bos_token="<s>")
    text = TextModel(tokenizer, ChatTemplate(None, {}))
    said = tokenizer.encode("東京 dog")
    padded = tokenizer.vocab_size + 3  # ids that only the model has
    worker = FakeWorker(script=lambda _, at: [*said, EOS][at])
    worker.vocab_size = padded + 1
    alike = [padded, padded - 1, padded - 2]
    worker.likely = {token: -float(rank + 1) for rank, token in enumerate([*alike, *{*said, EOS}])}
    async with router(worker, text=text) as running:
        body = {"model": "mock", "prompt": [padded], "logprobs": 5, "max_tokens": 50}
        answer = await running.post("/v1/completions", **body)
        assert answer.status_code == 200, answer.text  # the model's vocabulary, not the tokenizer's
        logprobs = answer.json()["choices"][0]["logprobs"]
        assert len(logprobs["tokens"]) == len(said) + 1
        for token, label, top in zip(
            [*said, EOS], logprobs["tokens"], logprobs["top_logprobs"], strict=True
        ):
            best = sorted(worker.likely.values(), reverse=True)[:5]
            assert sorted(top.values()) == sorted({*best, worker.likely[token]})
            assert top[label] == worker.likely[token]
            assert {f"token_id:{token}" for token in alike} <= top.keys()
        assert b"".join(map(bytes_of, logprobs["tokens"][:-1])).decode() == "東京 dog"
        answer = await running.post("/v1/completions", **{**body, "prompt": [padded + 1]})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")
        answer = await running.post("/detokenize", tokens=[*said, padded])
        assert answer.json() == {"prompt": "東京 dog"}


async def test_two_tokens_with_one_text_both_appear() -> None:
    tokenizer = HFTokenizer(byte_level())
    tokenizer._pieces |= {5: b"x", 6: b"x", 7: b"x"}
    worker = FakeWorker(script=lambda _, at: [6, EOS][at])
    worker.likely = {5: -1.0, 6: -2.0, 7: -3.0, EOS: -4.0}
    async with router(worker, text=TextModel(tokenizer, ChatTemplate(None, {}))) as running:
        body = {"model": "mock", "prompt": "x", "logprobs": 3}
        logprobs = (await running.post("/v1/completions", **body)).json()["choices"][0]["logprobs"]
        assert logprobs["top_logprobs"][0] == {"token_id:5": -1.0, "x": -2.0, "token_id:7": -3.0}
        assert list(logprobs["top_logprobs"][0]) == ["token_id:5", "x", "token_id:7"]


async def test_an_impossible_token_has_a_number() -> None:
    worker = FakeWorker(script=saying("a"))
    worker.likely = {ord("a"): -0.5, EOS: -1.0, 5: -math.inf}
    async with router(worker) as running:
        answer = await running.post("/generate", text="x", return_logprob=True, top_logprobs_num=3)
        top = answer.json()["meta_info"]["output_top_logprobs"]
        assert [entry[0] for entry in top[0]] == [-0.5, -1.0, -9999.0]
        body = {"model": "mock", "prompt": "x", "logprobs": 3}
        answer = await running.post("/v1/completions", **body)
        assert min(answer.json()["choices"][0]["logprobs"]["top_logprobs"][0].values()) == -9999.0


@pytest.mark.parametrize("tokens_per_step", [1, 4, 50])
async def test_usage_counts_to_the_token_that_ended_the_answer(tokens_per_step: int) -> None:
    worker = FakeWorker(script=saying("abcdefghijklmnop"))
    worker.tokens_per_step = tokens_per_step
    async with router(worker) as running:
        body = {"model": "mock", "prompt": "x", "stop": "ef", "max_tokens": 100}
        whole = (await running.post("/v1/completions", **body, return_token_ids=True)).json()
        assert whole["choices"][0]["text"] == "abcd"
        assert whole["usage"]["completion_tokens"] == 6
        assert bytes(whole["choices"][0]["token_ids"]) == b"abcdef"
        options = {"include_usage": True}
        events = await running.events("/v1/completions", **body, stream_options=options)
        assert events[-1]["usage"]["completion_tokens"] == 6
        reply = (await running.post("/generate", text="x", stop="ef", max_new_tokens=100)).json()
        assert reply["meta_info"]["completion_tokens"] == len(reply["output_ids"]) == 6


@pytest.mark.parametrize(
    ("min_tokens", "text", "count"),
    [
        (0, "a", 3),
        (2, "a", 3),  # "bc" is complete with the third token, and two are enough
        (3, "abcd-a", 8),
        (5, "abcd-a", 8),
        (7, "abcd-a", 8),
        (8, "abcd-abcd", 10),
    ],
)
async def test_min_tokens_holds_for_stop_strings(min_tokens: int, text: str, count: int) -> None:
    async with router(FakeWorker(script=saying("abcd-abcd"))) as running:
        body = {"model": "mock", "prompt": "x", "stop": ["bc"], "min_tokens": min_tokens}
        whole = (await running.post("/v1/completions", **body)).json()
        assert whole["choices"][0]["text"] == text
        assert whole["usage"]["completion_tokens"] == count
        assert text_of(await running.events("/v1/completions", **body)) == text


@given(
    st.text("ab", max_size=20),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1),
    st.integers(0, 20),
)
def test_an_unarmed_stop_matcher_against_plain_search(
    text: str, stops: list[str], unarmed: int
) -> None:
    matcher = StopMatcher(stops)
    shown, stopped = "", False
    for number, character in enumerate(text):
        new, stopped = matcher.feed(character, armed=number >= unarmed)
        shown += new
        if stopped:
            break
    for end in range(unarmed + 1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            assert stopped
            assert shown == text[: min(starts)]
            return
    assert not stopped
    assert shown + matcher.flush() == text
