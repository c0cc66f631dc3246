"""Requests that a router of the model `mock` must refuse.

Each has path, body, status, and the parameter that the error names. The model has 512 tokens in its
vocabulary and takes 4,096 in a sequence.
"""

from typing import Any

COMPLETION = {"model": "mock", "prompt": "hi"}
CHAT = {"model": "mock", "messages": [{"role": "user", "content": "hi"}]}
USER = {"role": "user", "content": "hi"}

BAD: list[tuple[str, dict[str, Any], int, str | None]] = [
    ("completions", {"prompt": "hi"}, 400, "model"),
    ("completions", {"model": "mock"}, 400, "prompt"),
    ("completions", {"model": "mock", "prompt": ""}, 400, "prompt"),
    ("completions", {"model": "mock", "prompt": []}, 400, "prompt"),
    ("completions", {"model": "mock", "prompt": 5}, 400, "prompt"),
    ("completions", {"model": "mock", "prompt": ["a", 5]}, 400, "prompt"),
    ("completions", {"model": "mock", "prompt": [[1], []]}, 400, "prompt"),
    ("completions", {"model": "mock", "prompt": [-1]}, 400, "prompt"),
    ("completions", {"model": "mock", "prompt": [512]}, 400, "prompt"),
    ("completions", {"model": "nobody", "prompt": "hi"}, 404, "model"),
    ("completions", {**COMPLETION, "model": 7}, 400, "model"),
    ("completions", {**COMPLETION, "max_tokens": 0}, 400, "max_tokens"),
    ("completions", {**COMPLETION, "max_tokens": -3}, 400, "max_tokens"),
    ("completions", {**COMPLETION, "max_tokens": "many"}, 400, "max_tokens"),
    ("completions", {**COMPLETION, "max_tokens": 1.5}, 400, "max_tokens"),
    ("completions", {**COMPLETION, "max_tokens": 100000}, 413, "max_tokens"),
    ("completions", {"model": "mock", "prompt": "x" * 5000}, 413, "prompt"),
    ("completions", {"model": "mock", "prompt": "x" * 20000}, 413, "prompt"),
    ("completions", {**COMPLETION, "min_tokens": 30, "max_tokens": 20}, 400, "min_tokens"),
    ("completions", {**COMPLETION, "temperature": -0.1}, 400, "temperature"),
    ("completions", {**COMPLETION, "temperature": "hot"}, 400, "temperature"),
    ("completions", {**COMPLETION, "temperature": True}, 400, "temperature"),
    ("completions", {**COMPLETION, "top_p": 0}, 400, "top_p"),
    ("completions", {**COMPLETION, "top_p": 1.1}, 400, "top_p"),
    ("completions", {**COMPLETION, "top_k": -2}, 400, "top_k"),
    ("completions", {**COMPLETION, "min_p": 2}, 400, "min_p"),
    ("completions", {**COMPLETION, "n": 0}, 400, "n"),
    ("completions", {**COMPLETION, "n": 1000}, 400, "n"),
    ("completions", {**COMPLETION, "best_of": 3}, 400, "best_of"),
    ("completions", {**COMPLETION, "presence_penalty": 3}, 400, "presence_penalty"),
    ("completions", {**COMPLETION, "frequency_penalty": -3}, 400, "frequency_penalty"),
    ("completions", {**COMPLETION, "repetition_penalty": 0}, 400, "repetition_penalty"),
    ("completions", {**COMPLETION, "logit_bias": {"x": 1}}, 400, "logit_bias"),
    ("completions", {**COMPLETION, "logit_bias": {"600": 1}}, 400, "logit_bias"),
    ("completions", {**COMPLETION, "logit_bias": {"6": 101}}, 400, "logit_bias.6"),
    ("completions", {**COMPLETION, "logprobs": 21}, 400, "logprobs"),
    ("completions", {**COMPLETION, "logprobs": 1, "echo": True}, 400, "echo"),
    ("completions", {**COMPLETION, "stop": ""}, 400, "stop[0]"),
    ("completions", {**COMPLETION, "stop": ["a"] * 17}, 400, "stop"),
    ("completions", {**COMPLETION, "stop": 5}, 400, "stop"),
    ("completions", {**COMPLETION, "stop_token_ids": ["a"]}, 400, "stop_token_ids[0]"),
    ("completions", {**COMPLETION, "seed": "lucky"}, 400, "seed"),
    ("completions", {**COMPLETION, "stream": "yes"}, 400, "stream"),
    ("completions", {**COMPLETION, "stream_options": {}}, 400, "stream_options"),
    ("completions", {**COMPLETION, "slo_class": "gold"}, 400, "slo_class"),
    ("completions", {**COMPLETION, "priority": 1.5}, 400, "priority"),
    ("completions", {**COMPLETION, "suffix": "end"}, 400, "suffix"),
    ("completions", {**COMPLETION, "user": 5}, 400, "user"),
    ("chat/completions", {"model": "mock"}, 400, "messages"),
    ("chat/completions", {"model": "mock", "messages": []}, 400, "messages"),
    ("chat/completions", {"model": "mock", "messages": "hi"}, 400, "messages"),
    ("chat/completions", {"model": "mock", "messages": ["hi"]}, 400, "messages[0]"),
    (
        "chat/completions",
        {"model": "mock", "messages": [USER, {"content": "x"}]},
        400,
        "messages[1].role",
    ),
    (
        "chat/completions",
        {"model": "mock", "messages": [{"role": "king", "content": "x"}]},
        400,
        "messages[0].role",
    ),
    ("chat/completions", {"model": "mock", "messages": [{"role": "user"}]}, 400, "messages[0]"),
    (
        "chat/completions",
        {"model": "mock", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        400,
        "messages[0].content[0].type",
    ),
    ("chat/completions", {**CHAT, "top_logprobs": 2}, 400, "top_logprobs"),
    ("chat/completions", {**CHAT, "logprobs": 3}, 400, "logprobs"),
    ("chat/completions", {**CHAT, "tools": [{"type": "function"}]}, 400, "tools"),
    (
        "chat/completions",
        {**CHAT, "response_format": {"type": "json_object"}},
        400,
        "response_format",
    ),
    ("chat/completions", {**CHAT, "max_completion_tokens": 0}, 400, "max_completion_tokens"),
    ("chat/completions", {**CHAT, "model": "nobody"}, 404, "model"),
]

BAD_GENERATE: list[tuple[dict[str, Any], int, str | None]] = [
    ({}, 400, "text"),
    ({"text": "a", "input_ids": [1]}, 400, "text"),
    ({"text": [1, 2]}, 400, "text"),
    ({"input_ids": "a"}, 400, "input_ids"),
    ({"text": "a", "max_new_tokens": 0}, 400, "max_new_tokens"),
    ({"text": "a", "sampling_params": {"top_p": 2}}, 400, "sampling_params.top_p"),
    ({"text": "a", "sampling_params": 5}, 400, "sampling_params"),
]
