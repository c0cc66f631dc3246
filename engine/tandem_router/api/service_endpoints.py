"""The endpoints that generate nothing: models, tokens, health, metrics, state."""

import time
from importlib import metadata

import msgspec

from tandem_router.api.exchange import Exchange, require_body
from tandem_router.api.generation import check_token_ids
from tandem_router.api.schema import DetokenizeRequest, TokenizeRequest, parse
from tandem_router.errors import NoWorker

STARTED = int(time.time())


def _model(exchange: Exchange) -> dict[str, object]:
    config = exchange.context.config
    welcome = exchange.context.fleet.welcome
    return {
        "id": config.model_name,
        "object": "model",
        "created": STARTED,
        "owned_by": "tandem",
        "root": config.model,
        "max_model_len": welcome.max_model_len if welcome is not None else None,
    }


async def list_models(exchange: Exchange) -> None:
    """GET /v1/models: the models that are served."""
    body = {"object": "list", "data": [_model(exchange)]}
    await exchange.reply(msgspec.json.encode(body))


async def get_model(exchange: Exchange) -> None:
    """GET /v1/models/{id}: one model."""
    exchange.context.check_model(exchange.path_params["model_id"])
    await exchange.reply(msgspec.json.encode(_model(exchange)))


async def tokenize(exchange: Exchange) -> None:
    """POST /tokenize: token ids of a text or a conversation."""
    context = exchange.context
    request = parse(TokenizeRequest, require_body(await exchange.body()))
    context.check_model(request.model)
    if request.messages is not None:
        tokens = await context.text.encode_chat(
            [message.for_template() for message in request.messages],
            **request.rendering,
        )
    else:
        tokens = await context.text.encode_text(
            request.prompt or "", add_special_tokens=request.add_special_tokens
        )
    if request.truncate_prompt_tokens is not None:
        tokens = context.text.shorten(tokens, request.truncate_prompt_tokens)
    welcome = context.fleet.welcome
    body: dict[str, object] = {
        "count": len(tokens),
        "max_model_len": welcome.max_model_len if welcome is not None else None,
        "tokens": tokens,
    }
    if request.return_token_strs:
        body["token_strs"] = [context.text.tokenizer.token_text(token) for token in tokens]
    await exchange.reply(msgspec.json.encode(body))


async def detokenize(exchange: Exchange) -> None:
    """POST /detokenize: the text of token ids."""
    context = exchange.context
    request = parse(DetokenizeRequest, require_body(await exchange.body()))
    context.check_model(request.model)
    tokenizer = context.text.tokenizer
    welcome = context.fleet.welcome
    # A model may have more ids than its tokenizer (a padded vocabulary); these have no text.
    vocab_size = context.text.vocab_size if welcome is None else welcome.vocab_size
    check_token_ids(request.tokens, vocab_size, "tokens")
    text = tokenizer.decode(request.tokens, skip_special_tokens=request.skip_special_tokens)
    await exchange.reply(msgspec.json.encode({"prompt": text}))


async def health(exchange: Exchange) -> None:
    """GET /health: the process is alive."""
    await exchange.reply(b'{"status":"ok"}')


async def ready(exchange: Exchange) -> None:
    """GET /ready: this router answers requests, if only by refusing them.

    Behind a Service, readiness doesn't depend on the pools: while there are no workers, the routers
    must stay its endpoints. They refuse with Retry-After, and the requests that they count wake a
    service that was scaled to zero. A fixed list of workers is one that never becomes empty.
    """
    context = exchange.context
    if context.dispatcher.leaving or context.dispatcher.draining:
        raise NoWorker("this router is shutting down", retry_after_seconds=1)
    if context.config.service:
        if not context.fleet.is_surveyed:
            raise NoWorker("this router is looking for workers", retry_after_seconds=1)
    elif not context.fleet.has_decode_worker():
        raise NoWorker("no decode worker is connected", retry_after_seconds=1)
    await exchange.reply(b'{"status":"ready"}')


async def version(exchange: Exchange) -> None:
    """GET /version: which release answers."""
    await exchange.reply(msgspec.json.encode({"version": metadata.version("tandem-inference")}))


async def metrics(exchange: Exchange) -> None:
    """GET /metrics: counters and histograms for Prometheus."""
    await exchange.reply(
        exchange.context.metrics.exposition(),
        content_type=b"text/plain; version=0.0.4; charset=utf-8",
    )


async def state(exchange: Exchange) -> None:
    """GET /state: the workers as this router sees them."""
    context = exchange.context
    body = {
        "model": context.config.model_name,
        "policy": context.config.policy,
        "draining": context.dispatcher.draining,
        "inflight": context.dispatcher.num_inflight,
        "waiting": context.dispatcher.num_waiting,
        "workers": context.fleet.describe(),
    }
    await exchange.reply(msgspec.json.encode(body))
