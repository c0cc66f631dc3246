"""From a validated request to its answer: sequences out, events in, bytes to the client."""

import random
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any

import msgspec

from tandem_router.api.choice import Choice
from tandem_router.api.exchange import Exchange
from tandem_router.api.formats import ReplyFormat, WholeChoice
from tandem_router.api.schema import Sampling
from tandem_router.config import SloClass
from tandem_router.dispatch.sequence import Sequence
from tandem_router.dispatch.stream import Event, TokenStream
from tandem_router.errors import ContextLengthExceeded, InvalidRequest, RouterError
from tandem_wire.hashing import salt_hash
from tandem_wire.messages import SamplingParams, Welcome

MAX_SEED = (1 << 63) - 1


@dataclass(frozen=True, kw_only=True)
class Job:
    """A generation request after validation and tokenizing."""

    request: Sampling
    prompts: list[list[int]]
    truncate: int | None = None  # only so many of a prompt's last tokens; -1: as many as fit
    slo_class: SloClass
    reply: ReplyFormat
    stops: tuple[str, ...]
    max_tokens: int | None  # None: as long as the model goes; 0: only the prompt's logprobs
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    # What the client calls these, for messages.
    prompt_param: str = "prompt"
    max_tokens_param: str = "max_tokens"
    min_tokens_param: str = "min_tokens"


def _parse_logit_bias(bias: dict[str, float] | None, vocab_size: int) -> dict[int, float]:
    """Keys of `logit_bias` as token ids. Raises InvalidRequest."""
    parsed: dict[int, float] = {}
    for key, value in (bias or {}).items():
        if not key.isdecimal() or int(key) >= vocab_size:
            raise InvalidRequest(
                f"logit_bias: {key!r} is not a token id; use 0 to {vocab_size - 1}",
                param="logit_bias",
            )
        parsed[int(key)] = value
    return parsed


def check_token_ids(tokens: SequenceOf[int], vocab_size: int, param: str) -> None:
    """Raise InvalidRequest for token ids outside the model's vocabulary."""
    worst = max(tokens, default=0)
    if worst >= vocab_size:
        raise InvalidRequest(
            f"{param}: token id {worst} is outside the model's vocabulary; "
            f"use 0 to {vocab_size - 1}",
            param=param,
        )


def _build_params(job: Job, prompt: list[int], facts: Welcome) -> SamplingParams:
    """The sampling parameters without the seed. Raises InvalidRequest."""
    request = job.request
    if not prompt:
        raise InvalidRequest(
            f"{job.prompt_param}: must have at least one token", param=job.prompt_param
        )
    check_token_ids(prompt, facts.vocab_size, job.prompt_param)
    check_token_ids(request.stop_token_ids or (), facts.vocab_size, "stop_token_ids")
    room = facts.max_model_len - len(prompt)
    if room < 1 or (job.max_tokens is not None and job.max_tokens > room):
        raise _too_long(job, len(prompt), facts.max_model_len)
    max_tokens = job.max_tokens if job.max_tokens is not None else room
    if job.min_tokens > max_tokens:
        raise InvalidRequest(
            f"{job.min_tokens_param}: {job.min_tokens} is more than {job.max_tokens_param} "
            f"{max_tokens}",
            param=job.min_tokens_param,
        )

    def given(value: float | None, default: float) -> float:
        return default if value is None else value

    return SamplingParams(
        max_tokens=max(max_tokens, 1),
        temperature=given(request.temperature, 1.0),
        top_k=max(request.top_k or 0, 0),
        top_p=given(request.top_p, 1.0),
        min_p=given(request.min_p, 0.0),
        presence_penalty=given(request.presence_penalty, 0.0),
        frequency_penalty=given(request.frequency_penalty, 0.0),
        repetition_penalty=given(request.repetition_penalty, 1.0),
        logit_bias=_parse_logit_bias(request.logit_bias, facts.vocab_size),
        logprobs=job.logprobs,
        stop_token_ids=request.stop_token_ids or [],
        ignore_eos=bool(request.ignore_eos),
        min_tokens=job.min_tokens,
        prompt_logprobs=job.prompt_logprobs,
    )


def _fingerprint(facts: Welcome) -> str:
    """Changes with what may change the tokens of a seed: model, revision, dtype, layout."""
    return f"fp_{salt_hash(facts.compatibility_hash):016x}"


def _too_long(job: Job, num_prompt: int, max_model_len: int) -> ContextLengthExceeded:
    """OpenAI's wording, which clients look for."""
    if num_prompt >= max_model_len:
        param, remedy = job.prompt_param, f"Shorten {job.prompt_param}"
        asked = f"your {job.prompt_param} has {num_prompt} tokens, which leaves none for the answer"
    else:
        param, wanted = job.max_tokens_param, job.max_tokens or 0
        remedy = f"Shorten {job.prompt_param}, or lower {param} to {max_model_len - num_prompt}"
        asked = (
            f"you requested {num_prompt + wanted} tokens ({num_prompt} in {job.prompt_param}, "
            f"{wanted} in {param})"
        )
    return ContextLengthExceeded.of(max_model_len, f"However, {asked}. {remedy}.", param)


class Generation:
    """Runs one job to its end and answers the exchange."""

    def __init__(self, exchange: Exchange, job: Job) -> None:
        self._exchange = exchange
        self._context = exchange.context
        self._job = job
        self._stream: TokenStream[Sequence] = TokenStream()
        self._choices: list[Choice] = []
        self._num_open = 0

    async def run(self) -> None:
        """Answer, streamed or whole. Raises RouterError before the answer has begun."""
        exchange, dispatcher = self._exchange, self._context.dispatcher
        exchange.is_generation = True
        exchange.slo_class = self._job.slo_class.name
        watcher = exchange.watch(self._stream)
        try:
            num_sequences = len(self._job.prompts) * (self._job.request.n or 1)
            dispatcher.admit(num_sequences)
            self._start(await dispatcher.model_facts(num_sequences))
            if self._job.request.stream:
                await self._answer_streaming()
            else:
                await self._answer_whole()
        finally:
            watcher.cancel()
            for choice in self._choices:
                choice.sequence.cancel()
            self._note()

    def _start(self, facts: Welcome) -> None:
        job, request = self._job, self._job.request
        first_seed = request.seed if request.seed is not None else random.getrandbits(62)
        end_tokens = frozenset(request.stop_token_ids or ())
        if not request.ignore_eos:
            end_tokens |= frozenset(facts.eos_token_ids)
        num_choices = request.n or 1
        priority = request.priority if request.priority is not None else job.slo_class.priority
        shown_stops: tuple[str, ...] = ()
        if request.include_stop_str_in_output or request.no_stop_trim:
            shown_stops = tuple(request.stop or ())
            end_tokens -= frozenset(request.stop_token_ids or ()) - frozenset(facts.eos_token_ids)
        for prompt_index, prompt in enumerate(self._shortened(facts)):
            params = _build_params(job, prompt, facts)
            for number in range(num_choices):
                seed = (first_seed + number) & MAX_SEED
                index = len(self._choices)
                sequence = Sequence(
                    self._context.dispatcher,
                    self._stream,
                    name=f"{self._exchange.name}-{index}",
                    index=index,
                    prompt=prompt,
                    params=msgspec.structs.replace(params, seed=seed),
                    arrived_at=self._exchange.arrived_at,
                    priority=priority,
                    slo_class=job.slo_class.name,
                    ttft_seconds=job.slo_class.ttft_seconds,
                    tbt_seconds=job.slo_class.tbt_seconds,
                    cache_salt=request.cache_salt or "",
                )
                self._choices.append(
                    Choice(
                        sequence,
                        self._context.text.tokenizer,
                        prompt_index=prompt_index,
                        stops=job.stops,
                        shown_stops=shown_stops,
                        skip_special_tokens=request.skip_special_tokens is not False,
                        end_tokens=end_tokens,
                        is_empty=job.max_tokens == 0,
                    )
                )
        job.reply.fingerprint = _fingerprint(facts)
        job.reply.usage_so_far = self._usage
        self._num_open = len(self._choices)
        for choice in self._choices:
            self._context.dispatcher.start(choice.sequence)

    def _shortened(self, facts: Welcome) -> list[list[int]]:
        job = self._job
        if job.truncate is None:
            return job.prompts
        fits = max(1, facts.max_model_len - (job.max_tokens or 1))
        limit = fits if job.truncate < 0 else job.truncate
        return [self._context.text.shorten(prompt, limit) for prompt in job.prompts]

    # --- answers ----------------------------------------------------------------------------------

    async def _answer_streaming(self) -> None:
        exchange, reply = self._exchange, self._job.reply
        parts = [reply.begin(self._choices)]
        while self._num_open:
            # The answer begins with the first events, so that a refusal can still be a status.
            events = await self._stream.next()
            for event in events:
                choice = self._take(event)
                if choice is not None:
                    last = choice.finish_reason and not self._num_open
                    parts.append(reply.chunk(choice, self._tandem() if last else None))
            if not exchange.status:
                await exchange.open_stream()
            if self._num_open and parts:
                await exchange.write(b"".join(parts))
                parts.clear()
        parts.append(reply.end(self._usage(), self._tandem()))
        await exchange.close_stream(b"".join(parts))

    async def _answer_whole(self) -> None:
        whole = [WholeChoice(choice, [], [], []) for choice in self._choices]
        while self._num_open:
            for event in await self._stream.next():
                choice = self._take(event)
                if choice is not None:
                    whole[choice.sequence.index].add()
        body = self._job.reply.whole(whole, self._usage(), self._tandem())
        await self._exchange.reply(body, headers=self._headers())

    def _take(self, event: Event[Sequence]) -> Choice | None:
        """Feed an event to its choice; the choice when it has something new to show."""
        sequence, item = event
        if isinstance(item, RouterError):
            raise item
        choice = self._choices[sequence.index]
        if choice.finish_reason:
            return None  # tokens behind a stop string, already under way when it was found
        shows = choice.feed(item)
        if choice.finish_reason:
            self._num_open -= 1
        # Ids are promised in full, also those whose text is still held back.
        return choice if shows or self._job.reply.return_token_ids else None

    # --- accounts ---------------------------------------------------------------------------------

    def _usage(self) -> dict[str, Any]:
        num_choices = self._job.request.n or 1
        firsts = self._choices[::num_choices]
        num_prompt = sum(len(choice.sequence.prompt) for choice in firsts)
        num_output = sum(choice.num_tokens for choice in self._choices)
        num_cached = sum(choice.sequence.num_cached_tokens for choice in firsts)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_output,
            "total_tokens": num_prompt + num_output,
            "prompt_tokens_details": {"cached_tokens": num_cached},
        }

    def _tandem(self) -> dict[str, Any]:
        """Who served it: of the first choice the workers, of all choices the sums."""
        first = self._choices[0].sequence
        return {
            "decode_worker": first.decode_worker,
            "prefill_worker": first.prefill_worker,
            "kv_bytes": sum(choice.sequence.kv_bytes for choice in self._choices),
            "failovers": sum(choice.sequence.failovers for choice in self._choices),
        }

    def _headers(self) -> dict[str, str]:
        return {
            f"x-tandem-{name.replace('_', '-')}": str(value)
            for name, value in self._tandem().items()
        }

    def _note(self) -> None:
        if not self._choices:
            return
        usage = self._usage()
        self._exchange.notes.update(
            prompt_tokens=usage["prompt_tokens"],
            output_tokens=usage["completion_tokens"],
            slo_class=self._job.slo_class.name,
            **self._tandem(),
        )
