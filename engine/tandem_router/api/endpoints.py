"""The endpoints that generate text."""

import uuid

from tandem_router.api.exchange import Exchange, require_body
from tandem_router.api.formats import ChatFormat, CompletionFormat, GenerateFormat
from tandem_router.api.generation import Generation, Job, check_token_ids, parse_logit_bias
from tandem_router.api.schema import (
    ChatRequest,
    CompletionRequest,
    GenerateParams,
    GenerateRequest,
    OpenAISampling,
    parse,
    refuse_unsupported,
)
from tandem_router.errors import InvalidRequest

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's
DEFAULT_GENERATE_TOKENS = 128  # SGLang's


def _wants_usage(request: OpenAISampling) -> bool:
    if request.stream_options is None:
        return False
    if not request.stream:
        raise InvalidRequest(
            "stream_options is only allowed with stream: true", param="stream_options"
        )
    return request.stream_options.include_usage


async def create_chat_completion(exchange: Exchange) -> None:
    """POST /v1/chat/completions."""
    context = exchange.context
    request = parse(ChatRequest, require_body(await exchange.body()))
    context.check_model(request.model)
    slo_class = context.choose_class(request.slo_class)
    include_usage = _wants_usage(request)
    vocab_size = context.text.tokenizer.vocab_size
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
            include_usage=include_usage,
            return_token_ids=bool(request.return_token_ids),
        ),
        stops=(*(request.stop or ()), *context.text.default_chat_stops),
        max_tokens=request.max_completion_tokens or request.max_tokens,
        min_tokens=request.min_tokens or 0,
        logprobs=logprobs,
        logit_bias=parse_logit_bias(request.logit_bias, vocab_size),
    )
    await Generation(exchange, job).run()


async def create_completion(exchange: Exchange) -> None:
    """POST /v1/completions."""
    context = exchange.context
    request = parse(CompletionRequest, require_body(await exchange.body()))
    context.check_model(request.model)
    slo_class = context.choose_class(request.slo_class)
    include_usage = _wants_usage(request)
    tokenizer = context.text.tokenizer
    prompts = await _encode_prompts(
        exchange, request.prompt, "prompt", add_special_tokens=request.add_special_tokens
    )
    reply = CompletionFormat(
        f"cmpl-{uuid.uuid4().hex}",
        context.config.model_name,
        tokenizer,
        include_usage=include_usage,
        return_token_ids=bool(request.return_token_ids),
    )
    if request.echo:
        reply.echoes = [
            prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
            for prompt in request.prompt
        ]
    job = Job(
        request=request,
        prompts=prompts,
        slo_class=slo_class,
        reply=reply,
        stops=tuple(request.stop or ()),
        max_tokens=request.max_tokens or DEFAULT_COMPLETION_TOKENS,
        min_tokens=request.min_tokens or 0,
        logprobs=request.logprobs,
        logit_bias=parse_logit_bias(request.logit_bias, tokenizer.vocab_size),
    )
    await Generation(exchange, job).run()


async def generate(exchange: Exchange) -> None:
    """POST /generate."""
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
    )
    await Generation(exchange, job).run()


def _merge_params(request: GenerateRequest) -> GenerateParams:
    """Top-level names and `sampling_params` together; the latter wins."""
    names = GenerateParams.model_fields
    merged = {name: getattr(request, name) for name in names}
    if request.sampling_params is not None:
        refuse_unsupported(request.sampling_params.model_extra or {})
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
            check_token_ids([entry], text.tokenizer.vocab_size, param)
            prompts.append(entry)
    if not all(prompts):
        raise InvalidRequest(f"{param}: must not be empty", param=param)
    return prompts
