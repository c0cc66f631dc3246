"""A prompt is scored as evaluation harnesses ask for it: `echo`, `logprobs` and no answer.

Through router, decode worker and a prefill worker that isn't asked, with the real model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from deadlines import patience

from tandem_engine.tests.real_gemma import MODEL, prompt_of, transformers_gemma
from tests.process_fleet import running_fleet

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PROMPTS = [prompt_of(length, start=7 * length) for length in (2, 9, 64, 65, 300)]


def score(url: str, max_tokens: int) -> list[dict[str, Any]]:
    body = {
        "model": MODEL.rpartition("/")[2],
        "prompt": PROMPTS,
        "echo": True,
        "logprobs": 1,
        "max_tokens": max_tokens,
        "temperature": 0,
        "seed": 1234,
    }
    reply = httpx.post(f"{url}/v1/completions", json=body, timeout=patience(300))
    assert reply.status_code == 200, reply.text
    answer = reply.json()
    assert answer["usage"]["completion_tokens"] == max_tokens * len(PROMPTS)
    assert (answer["tandem"]["prefill_worker"], answer["tandem"]["decode_worker"]) == ("", "d")
    choices: list[dict[str, Any]] = answer["choices"]
    return choices


@torch.inference_mode()
def test_scores_of_the_real_gemma_are_those_of_transformers(tmp_path: Path) -> None:
    flags = ("--page-size", "64", "--max-batched-tokens", "128", "--kv-memory", "640Mi")
    with running_fleet(tmp_path, MODEL, *flags) as fleet:
        scored = score(fleet.url, max_tokens=0)
        # Their blocks are cached by now, and one token more is asked for.
        again = score(fleet.url, max_tokens=1)
    model = transformers_gemma()
    for prompt, first, second in zip(PROMPTS, scored, again, strict=True):
        found = first["logprobs"]["token_logprobs"]
        assert found[0] is None
        reference = model(torch.tensor([prompt])).logits[0].float().log_softmax(-1)
        wanted = reference[:-1].gather(1, torch.tensor(prompt[1:])[:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(found[1:]), wanted, atol=1e-3, rtol=1e-3)
        # What lm-evaluation-harness calls greedy: the prompt's token is the likeliest one.
        best = [max(top.values()) for top in first["logprobs"]["top_logprobs"][1:]]
        torch.testing.assert_close(
            torch.tensor(best), reference[:-1].max(-1).values, atol=1e-3, rtol=1e-3
        )
        more = second["logprobs"]["token_logprobs"]
        assert len(more) == len(prompt) + 1
        assert more[1:-1] == pytest.approx(found[1:], abs=1e-3)
        assert first["finish_reason"] == "length"
