"""How exact a runner is in bfloat16, beside transformers with the same model."""

import torch
from transformers import PreTrainedModel

from tandem_engine.step import Batch, BatchItem, Runner
from tandem_engine.tests.step_driver import Blocks
from tandem_engine.tests.test_model_equality import make_prompt
from tandem_engine.tests.tiny_checkpoints import VOCAB
from tandem_wire.messages import SamplingParams

PROMPT = 120
LENGTH = 150


class Bfloat16Error:
    """The error of transformers in bfloat16, in the log probabilities of 31 consecutive tokens.

    Args:
        model: in float32. It is bfloat16 afterwards.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.tokens = make_prompt(LENGTH)
        self.exact = self._logprobs(model)
        model.to(torch.bfloat16)
        self.theirs = rms(self._logprobs(model) - self.exact)

    def check(self, runner: Runner, chunk: int) -> None:
        """Assert that a runner's error is not much larger."""
        ours = rms(forced_logprobs(runner, self.tokens, PROMPT, chunk) - self.exact)
        print(f"error {ours:.4f}, transformers {self.theirs:.4f}")
        assert ours <= 1.25 * self.theirs

    @torch.inference_mode()
    def _logprobs(self, model: PreTrainedModel) -> torch.Tensor:
        logits: torch.Tensor = model(torch.tensor([self.tokens])).logits
        return logits[0, PROMPT - 1 :].float().log_softmax(-1)


def forced_logprobs(runner: Runner, tokens: list[int], prompt: int, chunk: int) -> torch.Tensor:
    """[len(tokens) - prompt + 1, V]: after the prompt in chunks, then after each further token."""
    params = SamplingParams(max_tokens=1 << 30, temperature=0.0, logprobs=VOCAB)
    blocks = Blocks(runner, runner.kv.layout.page_size).take(len(tokens))
    spans = [(at, min(at + chunk, prompt)) for at in range(0, prompt, chunk)]
    spans += [(at, at + 1) for at in range(prompt, len(tokens))]
    rows = []
    for start, end in spans:
        item = BatchItem("r", tokens[start:end], start, blocks, end >= prompt, params)
        result = runner.execute(Batch([item]))[0]
        if result is not None:
            assert result.logprobs is not None
            (logprobs,) = result.logprobs
            row = torch.full((VOCAB,), float("nan"))
            row[logprobs.top_ids] = torch.tensor(logprobs.top_logprobs)
            rows.append(row)
    return torch.stack(rows)


def rms(x: torch.Tensor) -> float:
    return float(x.double().pow(2).mean().sqrt())
