"""What a worker accepts, and when a request ends."""

from dataclasses import dataclass

from tandem_engine.config import WorkerConfig
from tandem_engine.scheduler.request import Request
from tandem_engine.step import Runner
from tandem_wire.handoff import Prefill
from tandem_wire.messages import RefusalCode, SamplingParams, Submit


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Numbers that the scheduler obeys; all in tokens unless named otherwise."""

    page_size: int
    num_blocks: int
    max_model_len: int
    max_batched_tokens: int
    max_running: int  # sequences
    max_waiting: int  # sequences
    chunk_tokens: int
    local_prefill_tokens: int
    lease_seconds: float
    step_tokens: int  # the most that one step gives a sequence
    vocab_size: int
    eos_token_ids: tuple[int, ...]

    @classmethod
    def build(cls, config: WorkerConfig, runner: Runner) -> "Limits":
        """The limits of `config` on what `runner` has."""
        return cls(
            page_size=config.page_size,
            num_blocks=runner.num_blocks,
            max_model_len=min(runner.max_model_len, config.max_model_len or runner.max_model_len),
            max_batched_tokens=config.max_batched_tokens,
            max_running=config.max_running,
            max_waiting=config.max_waiting or 4 * config.max_running,
            chunk_tokens=config.chunk_tokens,
            local_prefill_tokens=config.local_prefill_tokens,
            lease_seconds=config.lease_seconds,
            step_tokens=runner.step_tokens,
            vocab_size=runner.vocab_size,
            eos_token_ids=runner.eos_token_ids,
        )

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold the KV of so many tokens."""
        return -(-num_tokens // self.page_size)

    def refusal(self, submit: Submit) -> tuple[RefusalCode, str] | None:
        """Why this worker can never run `submit`, or None."""
        params, num_prompt = submit.params, submit.num_prompt_tokens
        fault = self._token_fault(submit.tokens, num_prompt) or _params_fault(params)
        if fault:
            return "invalid", fault
        length = num_prompt + params.max_tokens
        if length > self.max_model_len:
            return "too_long", (
                f"{num_prompt} prompt tokens and max_tokens {params.max_tokens} are more than the "
                f"model's {self.max_model_len}; shorten the prompt or lower max_tokens"
            )
        if self.num_blocks_for(length) > self.num_blocks:
            return "too_long", (
                f"{length} tokens need {self.num_blocks_for(length)} KV blocks and this worker has "
                f"{self.num_blocks}; shorten the prompt or lower max_tokens"
            )
        return None

    def prefill_refusal(self, prefill: Prefill) -> tuple[str, str] | None:
        """Why this worker can never compute `prefill`, or None."""
        num_tokens, skip = len(prefill.tokens), prefill.num_skip_tokens
        fault = self._token_fault(prefill.tokens, prefill.num_prompt_tokens)
        if not fault and (skip % self.page_size or not 0 <= skip < num_tokens):
            fault = f"num_skip_tokens {skip} is not a page boundary inside the prompt"
        if not fault and len(prefill.blocks) != self.num_blocks_for(num_tokens - skip):
            fault = f"{len(prefill.blocks)} destination blocks for {num_tokens - skip} tokens"
        if fault:
            return "invalid", fault
        if num_tokens > self.max_model_len or self.num_blocks_for(num_tokens) > self.num_blocks:
            return "too_long", f"{num_tokens} tokens never fit this worker"
        return None

    def _token_fault(self, tokens: list[int], num_prompt_tokens: int) -> str:
        if not tokens or not 0 < num_prompt_tokens <= len(tokens):
            return f"num_prompt_tokens {num_prompt_tokens} with {len(tokens)} tokens; send a prompt"
        if min(tokens) < 0 or max(tokens) >= self.vocab_size:
            return f"token ids must be 0 to {self.vocab_size - 1}"
        return ""

    def prepare(self, request: Request) -> None:
        """Set what decides about the request's end."""
        params = request.params
        length = request.num_prompt_tokens + params.max_tokens
        request.end_length = min(length, self.max_model_len)
        stops = frozenset(params.stop_token_ids)
        request.stops = stops if params.ignore_eos else stops.union(self.eos_token_ids)


def _params_fault(params: SamplingParams) -> str:
    """What is wrong with sampling parameters that no model could follow, or an empty string."""
    checks = (
        (params.max_tokens >= 1, "max_tokens must be at least 1"),
        (0 <= params.min_tokens <= params.max_tokens, "min_tokens must be 0 to max_tokens"),
        (params.temperature >= 0, "temperature must not be negative"),
        (0 < params.top_p <= 1, "top_p must be above 0 and at most 1"),
        (0 <= params.min_p <= 1, "min_p must be 0 to 1"),
        (params.top_k >= 0, "top_k must not be negative; 0 turns it off"),
        (params.repetition_penalty > 0, "repetition_penalty must be positive"),
        (params.logprobs is None or params.logprobs >= 0, "logprobs must not be negative"),
    )
    return next((message for good, message in checks if not good), "")
