"""What a worker accepts, and when a request ends by its length or a stop token."""

from dataclasses import dataclass

from tandem_engine.config import WorkerConfig
from tandem_engine.scheduler.request import Request
from tandem_engine.step import Runner
from tandem_wire.handoff import Prefill
from tandem_wire.messages import RefusalCode, SamplingParams, Submit


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The numbers that the scheduler obeys, in tokens unless their names say otherwise."""

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
        """The limits that `config` sets to what `runner` has."""
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
        """How many blocks hold the KV of `num_tokens` tokens."""
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
                f"{num_prompt} prompt tokens plus max_tokens {params.max_tokens} exceed the "
                f"model's {self.max_model_len} tokens; shorten the prompt or lower max_tokens"
            )
        if self.num_blocks_for(length) > self.num_blocks:
            return "too_long", (
                f"{length} tokens need {self.num_blocks_for(length)} KV blocks, but this worker "
                f"has {self.num_blocks}; shorten the prompt or lower max_tokens"
            )
        return None

    def prefill_refusal(self, prefill: Prefill) -> tuple[str, str] | None:
        """Why this worker can never compute `prefill`, or None."""
        num_tokens, skip = len(prefill.tokens), prefill.num_skip_tokens
        fault = self._token_fault(prefill.tokens, prefill.num_prompt_tokens)
        if not fault and (skip % self.page_size or not 0 <= skip < num_tokens):
            fault = f"num_skip_tokens {skip} is not a page boundary inside the prompt"
        if not fault and len(prefill.blocks) != self.num_blocks_for(num_tokens - skip):
            fault = f"{len(prefill.blocks)} blocks can't take the KV of {num_tokens - skip} tokens"
        if fault:
            return "invalid", fault
        if num_tokens > self.max_model_len or self.num_blocks_for(num_tokens) > self.num_blocks:
            return "too_long", f"{num_tokens} tokens can never fit on this worker"
        return None

    def _token_fault(self, tokens: list[int], num_prompt_tokens: int) -> str:
        if not tokens or not 0 < num_prompt_tokens <= len(tokens):
            return (
                f"num_prompt_tokens is {num_prompt_tokens}, but there are {len(tokens)} tokens; "
                "send a prompt of at least one token"
            )
        if min(tokens) < 0 or max(tokens) >= self.vocab_size:
            return f"a token id is outside the vocabulary; ids are 0 to {self.vocab_size - 1}"
        return ""

    def prepare(self, request: Request) -> None:
        """Set where the request ends: its length and its stop tokens."""
        params = request.params
        length = request.num_prompt_tokens + params.max_tokens
        request.end_length = min(length, self.max_model_len)
        stops = frozenset(params.stop_token_ids)
        request.stops = stops if params.ignore_eos else stops.union(self.eos_token_ids)


def _params_fault(params: SamplingParams) -> str:
    """What is wrong with parameters that no model could follow; empty: nothing."""
    checks = (
        (params.max_tokens >= 1, "max_tokens must be at least 1"),
        (0 <= params.min_tokens <= params.max_tokens, "min_tokens must be 0 to max_tokens"),
        (params.temperature >= 0, "temperature must not be negative"),
        (0 < params.top_p <= 1, "top_p must be above 0 and at most 1"),
        (0 <= params.min_p <= 1, "min_p must be 0 to 1"),
        (params.top_k >= 0, "top_k must not be negative; 0 turns it off"),
        (params.repetition_penalty > 0, "repetition_penalty must be positive"),
        (params.logprobs is None or params.logprobs >= 0, "logprobs must not be negative"),
        (
            params.prompt_logprobs is None or params.prompt_logprobs >= 0,
            "prompt_logprobs must not be negative",
        ),
    )
    return next((message for good, message in checks if not good), "")
