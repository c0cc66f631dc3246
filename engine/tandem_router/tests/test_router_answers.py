"""What clients get: shapes, streams, stops, logprobs, accounts."""

import json
from typing import Any

import pytest
from openai.types.chat import ChatCompletionMessageParam
from prometheus_client.parser import text_string_to_metric_families

from tandem_router.app import ROUTES
from tandem_router.config import RouterConfig, SloClass
from tandem_router.main import parse_slo_classes
from tandem_router.metrics import METRICS, RouterMetrics
from tandem_router.tests.fake_worker import EOS, FakeWorker, counting, saying
from tandem_router.tests.harness import router, text_of, until

MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]
CHAT: dict[str, Any] = {"model": "mock", "messages": MESSAGES}


async def test_openai_client_chats_whole_and_streamed() -> None:
    async with router(FakeWorker(script=saying("Grüße, 世界! 😀"))) as running:
        client = running.openai()
        whole = await client.chat.completions.create(model="mock", messages=MESSAGES)
        assert whole.choices[0].message.content == "Grüße, 世界! 😀"
        assert whole.choices[0].finish_reason == "stop"
        assert whole.usage is not None
        assert whole.usage.prompt_tokens_details is not None
        assert whole.usage.prompt_tokens_details.cached_tokens == 3
        assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
        assert whole.model_extra is not None
        assert whole.model_extra["tandem"]["decode_worker"] == "d0"
        stream = await client.chat.completions.create(
            model="mock", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        assert chunks[0].choices[0].delta.role == "assistant"
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == "Grüße, 世界! 😀"
        assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
        assert chunks[-1].choices == []
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
        assert {c.id for c in chunks} == {chunks[0].id}
        await client.close()


async def test_openai_client_completes() -> None:
    async with router(FakeWorker()) as running:
        client = running.openai()
        whole = await client.completions.create(model="mock", prompt="abc", max_tokens=7, seed=5)
        assert len(whole.choices[0].text) == 7
        assert whole.choices[0].finish_reason == "length"
        stream = await client.completions.create(
            model="mock", prompt="abc", max_tokens=7, seed=5, stream=True
        )
        chunks = [chunk async for chunk in stream]
        assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
        await client.close()


async def test_a_stream_never_splits_a_character() -> None:
    text = "ä€😀" * 5
    async with router(FakeWorker(script=saying(text))) as running:
        events = await running.events("/v1/completions", model="mock", prompt="x", max_tokens=99)
        pieces = [event["choices"][0]["text"] for event in events]
        assert "".join(pieces) == text
        assert all("\ufffd" not in piece for piece in pieces)


async def test_an_unfinished_character_at_the_end_is_shown_as_such() -> None:
    async with router(FakeWorker(script=saying("a€".encode()[:-1]))) as running:
        answer = await running.post("/v1/completions", model="mock", prompt="x")
        assert answer.json()["choices"][0]["text"] == "a\ufffd"


async def test_n_choices_differ_by_seed_and_repeat() -> None:
    async with router(FakeWorker()) as running:
        body = {"model": "mock", "prompt": ["abc", "de"], "n": 3, "max_tokens": 5, "seed": 11}
        first = (await running.post("/v1/completions", **body)).json()
        texts = [choice["text"] for choice in first["choices"]]
        assert [choice["index"] for choice in first["choices"]] == list(range(6))
        assert len(set(texts[:3])) == 3
        assert first["usage"]["prompt_tokens"] == 5
        assert first["usage"]["completion_tokens"] == 30
        events = await running.events("/v1/completions", **body)
        assert [text_of(events, index) for index in range(6)] == texts
        chat = (await running.post("/v1/chat/completions", **CHAT, n=2, max_tokens=4)).json()
        assert len(chat["choices"]) == 2


async def test_a_seed_is_made_up_when_the_client_gives_none() -> None:
    worker = FakeWorker()
    async with router(worker) as running:
        for _ in range(2):
            await running.post("/v1/completions", model="mock", prompt="x", max_tokens=1)
        seeds = {submit.params.seed for submit in worker.submits}
        assert len(seeds) == 2


@pytest.mark.parametrize("tokens_per_step", [1, 3, 50])
@pytest.mark.parametrize("stop", ["lo wo", ["zzz", "wor", "world"], "d!"])
async def test_stop_strings_across_tokens(stop: str | list[str], tokens_per_step: int) -> None:
    worker = FakeWorker(script=saying("Hello world! More and more."))
    worker.tokens_per_step = tokens_per_step
    expected = {"lo wo": "Hel", "d!": "Hello worl"}.get(str(stop), "Hello ")
    async with router(worker) as running:
        body = {"model": "mock", "prompt": "x", "max_tokens": 100, "stop": stop}
        whole = (await running.post("/v1/completions", **body)).json()["choices"][0]
        assert (whole["text"], whole["finish_reason"]) == (expected, "stop")
        events = await running.events("/v1/completions", **body)
        assert text_of(events) == expected
        assert events[-1]["choices"][0]["finish_reason"] == "stop"
        await until(lambda: running.context.dispatcher.num_inflight == 0)
        if tokens_per_step == 1:
            await until(lambda: len(worker.cancelled) == 2)


async def test_text_that_only_looked_like_a_stop_is_shown() -> None:
    async with router(FakeWorker(script=saying("abcab"))) as running:
        body = {"model": "mock", "prompt": "x", "max_tokens": 100, "stop": "abd"}
        answer = (await running.post("/v1/completions", **body)).json()["choices"][0]
        assert (answer["text"], answer["finish_reason"]) == ("abcab", "stop")


async def test_stop_token_ids_end_without_being_shown() -> None:
    async with router(FakeWorker(script=saying("ab.cd"))) as running:
        body = {"model": "mock", "prompt": "x", "stop_token_ids": [ord(".")]}
        answer = (await running.post("/v1/completions", **body, return_token_ids=True)).json()
        choice = answer["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == ("ab", "stop")
        assert choice["token_ids"] == [97, 98, 46]
        assert choice["prompt_token_ids"] == [120]


async def test_chat_logprobs() -> None:
    async with router(FakeWorker(script=saying("hé"))) as running:
        body = {**CHAT, "logprobs": True, "top_logprobs": 2}
        whole = (await running.post("/v1/chat/completions", **body)).json()
        content = whole["choices"][0]["logprobs"]["content"]
        assert [entry["bytes"] for entry in content] == [[104], [0xC3], [0xA9], [*b"<eos>"]]
        assert all(len(entry["top_logprobs"]) == 2 for entry in content)
        assert content[0]["token"] == "h"
        assert content[0]["logprob"] == -0.5
        events = await running.events("/v1/chat/completions", **body)
        streamed = [
            entry for event in events for entry in event["choices"][0]["logprobs"]["content"]
        ]
        assert streamed == content


async def test_completion_logprobs_end_with_the_token_that_completes_the_stop_string() -> None:
    async with router(FakeWorker(script=saying("abcdef"))) as running:
        body = {"model": "mock", "prompt": "x", "logprobs": 1, "stop": "de"}
        choice = (await running.post("/v1/completions", **body)).json()["choices"][0]
        assert choice["text"] == "abc"
        assert choice["logprobs"]["tokens"] == ["a", "b", "c", "d", "e"]
        assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3, 4]
        assert choice["logprobs"]["token_logprobs"] == [-0.5] * 5
        assert choice["logprobs"]["top_logprobs"][0] == {"a": -0.5}
        events = await running.events("/v1/completions", **body)
        tokens = [token for event in events for token in event["choices"][0]["logprobs"]["tokens"]]
        assert tokens == ["a", "b", "c", "d", "e"]


async def test_echo_and_token_ids() -> None:
    async with router(FakeWorker()) as running:
        body = {"model": "mock", "prompt": [104, 105], "echo": True, "max_tokens": 3, "seed": 0}
        whole = (await running.post("/v1/completions", **body)).json()["choices"][0]["text"]
        assert whole.startswith("hi")
        assert len(whole) == 5
        events = await running.events("/v1/completions", **body, return_token_ids=True)
        assert text_of(events) == whole
        assert events[0]["choices"][0]["prompt_token_ids"] == [104, 105]
        ids = [token for event in events[1:] for token in event["choices"][0]["token_ids"]]
        assert len(ids) == 3
        chat = await running.events(
            "/v1/chat/completions", **CHAT, return_token_ids=True, max_tokens=2
        )
        assert chat[0]["prompt_token_ids"]


async def test_parameters_reach_the_worker() -> None:
    worker = FakeWorker()
    async with router(worker) as running:
        answer = await running.post(
            "/v1/completions",
            model="mock",
            prompt="x",
            max_tokens=4,
            min_tokens=2,
            temperature=0,
            top_p=0.5,
            top_k=7,
            min_p=0.1,
            presence_penalty=1,
            frequency_penalty=-1,
            repetition_penalty=1.5,
            logit_bias={"5": 2.5},
            ignore_eos=True,
            seed=3,
            priority=9,
            cache_salt="tenant",
            user="someone",
        )
        assert answer.status_code == 200
        submit = worker.submits[0]
        params = submit.params
        assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0, 0.5, 7, 0.1)
        assert (params.presence_penalty, params.frequency_penalty) == (1, -1)
        assert (params.repetition_penalty, params.logit_bias) == (1.5, {5: 2.5})
        assert (params.ignore_eos, params.min_tokens, params.max_tokens) == (True, 2, 4)
        assert (params.seed, submit.priority, submit.cache_salt) == (3, 9, "tenant")


async def test_chat_without_max_tokens_may_fill_the_context() -> None:
    worker = FakeWorker(script=saying("ok"), max_model_len=100)
    async with router(worker) as running:
        await running.post("/v1/chat/completions", **CHAT)
        submit = worker.submits[0]
        assert submit.params.max_tokens == 100 - len(submit.tokens)
        assert bytes(submit.tokens) == b"User: hi\nAssistant:"


async def test_a_base_model_stops_before_the_next_turn() -> None:
    async with router(FakeWorker(script=saying("Fine.\nUser: and you?"))) as running:
        answer = (await running.post("/v1/chat/completions", **CHAT)).json()
        assert answer["choices"][0]["message"]["content"] == "Fine."


async def test_generate_as_in_sglang() -> None:
    async with router(FakeWorker(script=counting)) as running:
        one = (await running.post("/generate", text="hi", max_new_tokens=4, temperature=0.7)).json()
        assert len(one["text"]) == 4
        assert one["meta_info"]["finish_reason"] == {"type": "length", "length": 4}
        assert one["output_ids"] == [ord(letter) for letter in one["text"]]
        ids = await running.post(
            "/generate",
            input_ids=[[104, 105], [1]],
            sampling_params={"max_new_tokens": 3, "seed": 1, "min_new_tokens": 1},
            return_logprob=True,
            top_logprobs_num=1,
        )
        replies = ids.json()
        assert len(replies) == 2
        assert len(replies[0]["meta_info"]["output_token_logprobs"]) == 3
        assert replies[0]["meta_info"]["output_top_logprobs"][0][0][0] == -0.5
        events = await running.events("/generate", text="hi", sampling_params={"max_new_tokens": 3})
        assert [len(event["text"]) for event in events] == [1, 2, 3]
        assert events[-1]["tandem"]["decode_worker"] == "d0"
        batch = await running.events("/generate", text=["a", "b"], max_new_tokens=2)
        assert {event["index"] for event in batch} == {0, 1}


async def test_models_tokens_and_state() -> None:
    async with router(FakeWorker(max_model_len=321)) as running:
        models = (await running.http.get("/v1/models")).json()
        assert [model["id"] for model in models["data"]] == ["mock"]
        assert (await running.http.get("/v1/models/mock")).json()["max_model_len"] == 321
        assert (await running.http.get("/v1/models/other")).status_code == 404
        tokens = (await running.post("/tokenize", prompt="hé")).json()
        assert tokens == {"count": 3, "max_model_len": 321, "tokens": [104, 195, 169]}
        chat = (await running.post("/tokenize", messages=CHAT["messages"])).json()
        assert bytes(chat["tokens"]) == b"User: hi\nAssistant:"
        text = (await running.post("/detokenize", tokens=[104, 195, 169])).json()
        assert text == {"prompt": "hé"}
        assert (await running.http.get("/health")).status_code == 200
        assert (await running.http.get("/ready")).status_code == 200
        state = (await running.monitor.get("/state")).json()
        assert state["workers"][0]["worker_id"] == "d0"
        assert state["workers"][0]["connected"] is True


async def test_metrics_are_those_of_the_contract() -> None:
    classes = _classes()
    async with router(FakeWorker(step_seconds=0.002), slo_classes=classes) as running:
        await running.post("/v1/completions", model="mock", prompt="abcd", max_tokens=20)
        await running.post(
            "/v1/completions", model="mock", prompt="abcd", max_tokens=3, slo_class="batch"
        )
        await running.post("/v1/completions", model="other", prompt="abcd")
        text = (await running.monitor.get("/metrics")).text
        for line in (
            'tandem_ttft_seconds_count{class="interactive",model="mock",pool="prefill"} 1.0',
            'tandem_tbt_seconds_count{class="interactive",model="mock",pool="decode"} 19.0',
            'tandem_tbt_tail_seconds_count{class="batch",model="mock",pool="decode"} 1.0',
            'tandem_e2e_seconds_count{class="batch",model="mock"} 1.0',
            'tandem_requests_total{class="interactive",code="200",model="mock"} 1.0',
            'tandem_prompt_tokens_total{cached="true",model="mock"} 6.0',
            'tandem_prompt_tokens_total{cached="false",model="mock"} 2.0',
            'tandem_output_tokens_total{model="mock"} 23.0',
            'tandem_slo_attained_total{class="interactive",model="mock",objective="ttft"} 1.0',
            'tandem_slo_missed_total{class="batch",model="mock",objective="tbt"} 1.0',
            'tandem_inflight{model="mock"} 0.0',
            'le="0.001"',
        ):
            assert line in text, line


def test_every_metric_of_the_table_is_shown_and_no_other() -> None:
    metrics = RouterMetrics(
        RouterConfig(model_name="m", model="mock://tiny", slo_classes=_classes())
    )
    for seconds in (0.5, 100.0):  # objectives kept, and broken
        metrics.ttft("batch", seconds / 1e3)
        metrics.tbt("batch", seconds)
        metrics.sequence_done("batch", 4, 1, 2, [seconds / 1e3])
    metrics.request_done("batch", 200, 1.0)
    metrics.rejected("no_room")
    metrics.failover("decode")
    shown = {}
    for family in text_string_to_metric_families(metrics.exposition().decode()):
        if family.name.endswith("_created"):
            continue  # the client library's own
        names = {name for each in family.samples for name in each.labels} - {"le"}
        suffix = "_total" if family.type == "counter" else ""
        shown[family.name + suffix] = (family.type, family.documentation, names)
    assert shown == {spec.name: (spec.kind, spec.text, set(spec.labels)) for spec in METRICS}


async def test_a_key_opens_every_route_that_is_not_public() -> None:
    async with router(FakeWorker(), api_keys=("secret",)) as running:
        for spec in ROUTES:
            path = spec.path.replace("{model_id:path}", "mock")
            closed = (await running.http.request(spec.method, path)).status_code
            header = {"authorization": "Bearer secret"}
            opened = (await running.http.request(spec.method, path, headers=header)).status_code
            assert (closed == 401) == (not spec.public), path
            assert opened in (200, 400), path


async def test_a_bug_of_ours_is_an_error_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    async with router(FakeWorker()) as running:

        def fail(*_: object) -> None:
            raise RuntimeError("a bug")

        monkeypatch.setattr(running.context.dispatcher, "admit", fail)
        answer = await running.post("/v1/chat/completions", **CHAT)
        assert answer.status_code == 500
        assert "a bug" not in answer.json()["error"]["message"]


def _classes() -> tuple[SloClass, ...]:
    return parse_slo_classes(
        json.dumps(
            [
                {
                    "name": "interactive",
                    "default": True,
                    "ttftMilliseconds": 60000,
                    "priority": 100,
                },
                {"name": "batch", "ttftMilliseconds": 1, "tbtMilliseconds": 1},
            ]
        )
    )


async def test_eos_is_no_text_even_when_special_tokens_are_shown() -> None:
    async with router(FakeWorker(script=lambda _, i: [65, 256, EOS][i])) as running:
        body = {"model": "mock", "prompt": "x", "skip_special_tokens": False}
        answer = (await running.post("/v1/completions", **body)).json()
        assert answer["choices"][0]["text"] == "A<bos>"
