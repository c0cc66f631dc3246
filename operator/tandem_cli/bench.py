"""`tandem bench`: kernels, steps, the engine in process, any OpenAI endpoint."""

from pathlib import Path
from typing import Annotated

import typer

bench_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Measure kernels, steps, the engine in process, or any OpenAI endpoint.",
)

WORKER_FLAGS = {"allow_extra_args": True, "ignore_unknown_options": True}

Json = Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")]
Lengths = typer.Option(metavar="N|LOW-HIGH", help="Tokens; a range is drawn from uniformly.")


@bench_app.command()
def serve(
    url: Annotated[str, typer.Option(help="Any OpenAI endpoint.")] = "http://127.0.0.1:8000",
    model: Annotated[str, typer.Option(help="Default: the first of /v1/models.")] = "",
    api_key: Annotated[str, typer.Option(help="Default: $OPENAI_API_KEY, or none.")] = "",
    rate: Annotated[
        float | None, typer.Option(help="Open loop: requests per second; `inf`: all at once.")
    ] = None,
    rates: Annotated[str, typer.Option(help="A sweep of such rates: 1,2,4,8.")] = "",
    burstiness: Annotated[
        float, typer.Option(help="1: Poisson; less: bursts; inf: a metronome.")
    ] = 1.0,
    concurrency: Annotated[
        int, typer.Option(help="Closed loop: so many requests at a time, always.")
    ] = 0,
    num_requests: Annotated[int, typer.Option(help="Of each run.")] = 0,
    duration: Annotated[float, typer.Option(help="Seconds of sending, of each run.")] = 0.0,
    input_len: Annotated[str, Lengths] = "512",
    output_len: Annotated[str, Lengths] = "128",
    prefix_share: Annotated[
        float, typer.Option(help="Share of each prompt that is common to many (0 to 1).")
    ] = 0.0,
    num_prefixes: Annotated[int, typer.Option(help="How many common prefixes there are.")] = 1,
    dataset: Annotated[
        str, typer.Option(help="`random` is the only one but for --trace.")
    ] = "random",
    trace: Annotated[
        Path | None,
        typer.Option(help="Replay a Mooncake, Azure, ServeGen or Vidur file."),
    ] = None,
    speed: Annotated[float, typer.Option(help="Replay so many times faster.")] = 1.0,
    trace_start: Annotated[float, typer.Option(help="Seconds of the trace to leave out.")] = 0.0,
    sample: Annotated[float, typer.Option(help="Share of the trace's requests to keep.")] = 1.0,
    spread: Annotated[
        bool, typer.Option(help="Spread requests of one timestamp until the next one.")
    ] = True,
    length_scale: Annotated[float, typer.Option(help="Scale the trace's lengths.")] = 1.0,
    max_input: Annotated[int, typer.Option(help="Cut the trace's prompts to so many.")] = 0,
    max_output: Annotated[int, typer.Option(help="Cut the trace's answers to so many.")] = 0,
    seed: Annotated[int, typer.Option(help="Of arrivals and lengths.")] = 0,
    nonce: Annotated[
        int | None,
        typer.Option(help="Of the tokens; default: a new one, which no cache has seen."),
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option(help="Answers have exactly the planned length.")
    ] = True,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    extra_body: Annotated[str, typer.Option(help="JSON object that goes with every request.")] = "",
    prompts: Annotated[str, typer.Option(help="`auto`, `ids` or `text`.")] = "auto",
    vocab_size: Annotated[
        int, typer.Option(help="Token ids are below this; default: found by asking.")
    ] = 0,
    slo_ttft: Annotated[float, typer.Option(help="Objective in milliseconds.")] = 0.0,
    slo_tbt: Annotated[float, typer.Option(help="Objective in milliseconds.")] = 0.0,
    slo_tbt_percentile: Annotated[
        float, typer.Option(help="Of a request's own gaps, held against --slo-tbt.")
    ] = 95.0,
    warmup: Annotated[int, typer.Option(help="Requests sent first and not counted.")] = 2,
    request_timeout: Annotated[float, typer.Option(help="Seconds for one whole request.")] = 600.0,
    title: Annotated[str, typer.Option(help="Heading of the report.")] = "",
    json_file: Json = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with plots.")] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(help="Measure nothing: set two --json files side by side."),
    ] = None,
) -> None:
    """Load an OpenAI endpoint and measure TTFT, every gap, tail gaps and goodput.

    An **open loop** (`--rate`, `--rates`, `--trace`) sends each request when it is due, whether or
    not earlier ones have finished; a **closed loop** (`--concurrency`) keeps that many requests
    under way.

        tandem bench serve --rates 1,2,4,8 --duration 60 --slo-ttft 500 --slo-tbt 50 --html out.html

    Works the same against vLLM and SGLang; see docs/benchmarking.md.
    """
    from tandem_cli import bench_serve as command

    if compare is not None:
        command.compare_reports(*compare, html, slo_ttft, slo_tbt)
        return
    command.measure(
        command.ServeOptions(
            url=url,
            model=model,
            api_key=api_key,
            rate=rate,
            rates=rates,
            burstiness=burstiness,
            concurrency=concurrency,
            num_requests=num_requests,
            duration=duration,
            input_len=input_len,
            output_len=output_len,
            prefix_share=prefix_share,
            num_prefixes=num_prefixes,
            dataset=dataset,
            trace=trace,
            speed=speed,
            trace_start=trace_start,
            sample=sample,
            spread=spread,
            length_scale=length_scale,
            max_input=max_input,
            max_output=max_output,
            seed=seed,
            nonce=nonce,
            ignore_eos=ignore_eos,
            temperature=temperature,
            extra_body=extra_body,
            prompts=prompts,
            vocab_size=vocab_size,
            slo_ttft=slo_ttft,
            slo_tbt=slo_tbt,
            slo_tbt_percentile=slo_tbt_percentile,
            warmup=warmup,
            request_timeout=request_timeout,
            title=title,
        ),
        json_file,
        html,
    )


@bench_app.command(context_settings=WORKER_FLAGS)
def offline(
    ctx: typer.Context,
    model: Annotated[
        str, typer.Option(help="Model URI, or a short name as of `bench step` (--format Dummy).")
    ],
    num_seqs: Annotated[int, typer.Option(help="Sequences, all there at once.")] = 256,
    input_len: Annotated[str, Lengths] = "100-1024",
    output_len: Annotated[str, Lengths] = "100-1024",
    seed: Annotated[int, typer.Option(help="Of lengths and prompts.")] = 0,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.6,
    warmup_seqs: Annotated[
        int, typer.Option(min=0, help="Sequences run first, a few tokens each, not counted.")
    ] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Runs; all are printed.")] = 1,
    json_file: Json = None,
) -> None:
    """The engine in this process, without HTTP: nano-vllm's published 256 sequences.

    Every other flag goes to the worker (`tandem-worker --help`):

        tandem bench offline --model llama-8b --format Dummy --dtype BFloat16 --device cuda
    """
    from tandem_cli.bench_offline import OfflineOptions, measure

    measure(
        OfflineOptions(
            model=model,
            num_seqs=num_seqs,
            input_len=input_len,
            output_len=output_len,
            seed=seed,
            temperature=temperature,
            warmup_seqs=warmup_seqs,
            repeats=repeats,
            worker_flags=tuple(ctx.args),
        ),
        json_file,
    )


@bench_app.command()
def kernels(
    only: Annotated[
        str, typer.Option(help="Of rows, attention, prefill, memory, gemm, moe, mla.")
    ] = "",
    json_file: Json = None,
) -> None:
    """Every kernel against the floor that this GPU's own copy and matmul rates allow.

    Each is checked against its reference first; no time is reported for a wrong result.
    """
    from tandem_cli.bench_gpu import measure_kernels

    measure_kernels(only, json_file)


@bench_app.command()
def step(
    model: Annotated[
        str,
        typer.Option(
            help="llama-8b, qwen2.5-7b, qwen3-0.6b, gemma3-4b, qwen3-moe-30b, deepseek-v2-lite, or "
            "a model URI (for its config)."
        ),
    ] = "llama-8b",
    cases: Annotated[
        str, typer.Option(help="BATCHxCONTEXT of the decode steps.")
    ] = "1x1024,8x1024,32x1024,64x1024,256x1024,32x8192",
    prefill: Annotated[bool, typer.Option(help="Also whole prefills.")] = True,
    prefill_cases: Annotated[
        str, typer.Option(help="PROMPTxCHUNK of the prefills.")
    ] = "1024x8192,8192x8192,32768x8192",
    engine: Annotated[
        bool,
        typer.Option(
            "--engine",
            help="Run the engine's own steps, host and all; always so for models with experts, "
            "latent attention or windows.",
        ),
    ] = False,
    json_file: Json = None,
) -> None:
    """A whole decode step and prefill of a model's shape, random weights, against the floor."""
    from tandem_cli.bench_gpu import measure_step

    measure_step(model, cases, prefill_cases, prefill, engine, json_file)
