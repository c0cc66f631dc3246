"""The endpoints that generate text."""

import uuid

from tandem_router.api.exchange import Exchange, require_body
from tandem_router.api.formats import (
    NO_USAGE,
    ChatFormat,
    CompletionFormat,
    GenerateFormat,
    UsageWanted,
)
from tandem_router.api.generation import Generation, Job
from tandem_router.api.schema import (
    ChatRequest,
    CompletionRequest,
    GenerateParams,
    GenerateRequest,
    OpenAISampling,
    parse,
)
from tandem_router.errors import InvalidRequest

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's
DEFAULT_GENERATE_TOKENS = 128  # SGLang's


def _usage_wanted(request: OpenAISampling) -> UsageWanted:
    options = request.stream_options
    if options is None:
        return NO_USAGE
    if not request.stream:
        raise InvalidRequest("stream_options: needs stream: true", param="stream_options")
    return UsageWanted(bool(options.include_usage), bool(options.continuous_usage_stats))


async def create_chat_completion(exchange: Exchange) -> None:
    """POST /v1/chat/completions: the next message of a conversation."""
    context = exchange.context
    request = parse(ChatRequest, require_body(await exchange.body()))
    context.check_model(request.model)
    slo_class = context.choose_class(request.slo_class)
    usage_wanted = _usage_wanted(request)
    prompt = await context.text.encode_chat(
        [message.for_template() for message in request.messages],
        add_generation_prompt=request.add_generation_prompt,
        variables=request.chat_template_kwargs,
    )
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    job = Job(
        request=request,
        prompts=[prompt],
        slo_class=slo_class,
        reply=ChatFormat(
            f"chatcmpl-{uuid.uuid4().hex}",
            context.config.model_name,
            context.text.tokenizer,
            usage_wanted=usage_wanted,
            return_token_ids=bool(request.return_token_ids),
        ),
        stops=(*(request.stop or ()), *context.text.default_chat_stops),
        max_tokens=request.max_completion_tokens or request.max_tokens,
        min_tokens=request.min_tokens or 0,
        logprobs=logprobs,
        prompt_param="messages",
        max_tokens_param=(
            "max_completion_tokens" if request.max_completion_tokens else "max_tokens"
        ),
    )
    await Generation(exchange, job).run()


async def create_completion(exchange: Exchange) -> None:
    """POST /v1/completions: how a text goes on."""
    context = exchange.context
    request = parse(CompletionRequest, require_body(await exchange.body()))
    context.check_model(request.model)
    slo_class = context.choose_class(request.slo_class)
    usage_wanted = _usage_wanted(request)
    tokenizer = context.text.tokenizer
    prompts = await _encode_prompts(
        exchange, request.prompt, "prompt", add_special_tokens=request.add_special_tokens
    )
    reply = CompletionFormat(
        f"cmpl-{uuid.uuid4().hex}",
        context.config.model_name,
        tokenizer,
        usage_wanted=usage_wanted,
        return_token_ids=bool(request.return_token_ids),
    )
    max_tokens = DEFAULT_COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens
    if request.echo:
        reply.echoed = request.prompt
        reply.scores_prompt = request.logprobs is not None
    job = Job(
        request=request,
        prompts=prompts,
        slo_class=slo_class,
        reply=reply,
        stops=tuple(request.stop or ()),
        max_tokens=max_tokens,
        min_tokens=request.min_tokens or 0,
        logprobs=request.logprobs,
        prompt_logprobs=request.logprobs if request.echo else None,
    )
    await Generation(exchange, job).run()


async def generate(exchange: Exchange) -> None:
    """POST /generate: how a text goes on, in SGLang's shape."""
    context = exchange.context
    request = parse(GenerateRequest, require_body(await exchange.body()))
    context.check_model(request.model)
    params = _merge_params(request)
    slo_class = context.choose_class(params.slo_class)
    inputs = request.text if request.text is not None else request.input_ids
    assert inputs is not None, "the schema requires one of them"
    name = "text" if request.text is not None else "input_ids"
    prompts = await _encode_prompts(exchange, inputs, name)
    reply = GenerateFormat(exchange.request_id, context.config.model_name, context.text.tokenizer)
    # Ids are part of every chunk, so those whose text is held back must be sent as well.
    reply.return_token_ids = True
    reply.is_batch = len(prompts) * (params.n or 1) > 1
    job = Job(
        request=params,
        prompts=prompts,
        slo_class=slo_class,
        reply=reply,
        stops=tuple(params.stop or ()),
        max_tokens=params.max_new_tokens or DEFAULT_GENERATE_TOKENS,
        min_tokens=params.min_new_tokens or 0,
        logprobs=(request.top_logprobs_num or 0) if request.return_logprob else None,
        prompt_param=name,
        max_tokens_param="max_new_tokens",
        min_tokens_param="min_new_tokens",
    )
    await Generation(exchange, job).run()


def _merge_params(request: GenerateRequest) -> GenerateParams:
    """Top-level names and `sampling_params` together; the latter wins."""
    names = GenerateParams.model_fields
    merged = {name: getattr(request, name) for name in names}
    if request.sampling_params is not None:
        inner = request.sampling_params
        merged |= {name: getattr(inner, name) for name in inner.model_fields_set if name in names}
    return GenerateParams.model_construct(**merged)


async def _encode_prompts(
    exchange: Exchange,
    inputs: list[str | list[int]],
    param: str,
    *,
    add_special_tokens: bool = True,
) -> list[list[int]]:
    text = exchange.context.text
    prompts: list[list[int]] = []
    for entry in inputs:
        if isinstance(entry, str):
            prompts.append(await text.encode_text(entry, add_special_tokens=add_special_tokens))
        else:
            prompts.append(entry)
    if not all(prompts):
        raise InvalidRequest(f"{param}: must not be empty", param=param)
    return prompts
