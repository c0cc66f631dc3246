"""The `tandem` command. Every subcommand imports what it needs when it runs, not before."""

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from tandem_cli.bench import bench_app
from tandem_cli.errors import CliError

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Disaggregated LLM inference on Kubernetes: cluster, operator, engine and router.\n\n"
    "Start with `tandem up`: it brings up a cluster on this machine, installs the operator, "
    "applies a first InferenceService and asks the model a question.",
)
cluster_app = typer.Typer(no_args_is_help=True, help="The embedded Kubernetes cluster alone.")
app.add_typer(cluster_app, name="cluster")
app.add_typer(bench_app, name="bench")
debug_app = typer.Typer(no_args_is_help=True, help="What workers hold, from the inside.")
app.add_typer(debug_app, name="debug")
rollout_app = typer.Typer(no_args_is_help=True, help="How a new revision replaces the old one.")
app.add_typer(rollout_app, name="rollout")

PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def _is_given(ctx: typer.Context, name: str) -> bool:
    """Whether an option or argument is on the command line."""
    source = ctx.get_parameter_source(name)
    # typer has its own copy of click, or none, depending on its version.
    return source is not None and source.name == "COMMANDLINE"


def _one_cluster(ctx: typer.Context, value: Any) -> Any:
    """Of --cluster and --kubeconfig the one on the command line; only one of them may be there."""
    given = [_is_given(ctx, name) for name in ("cluster", "kubeconfig")]
    if all(given):
        raise CliError("--cluster and --kubeconfig each name a cluster", "leave one of them out")
    # A variable must not win over the flag.
    return None if given[0] and isinstance(value, Path) else value


ClusterName = Annotated[
    str,
    typer.Option(
        "--cluster",
        envvar="TANDEM_CLUSTER",
        callback=_one_cluster,
        help="Name of the embedded cluster.",
    ),
]
Kubeconfig = Annotated[
    Path | None,
    typer.Option(
        envvar="TANDEM_KUBECONFIG",
        callback=_one_cluster,
        help="Use this existing cluster instead of the embedded one.",
    ),
]
Namespace = Annotated[str, typer.Option("--namespace", "-n", help="Namespace of the service.")]
ServiceName = Annotated[str, typer.Argument(help="Name of the InferenceService.")]
Output = Annotated[
    Literal["table", "json"], typer.Option("--output", "-o", help="For people or for programs.")
]
Role = Annotated[
    Literal["prefill", "decode", "router"] | None, typer.Option(help="Default: all of them.")
]


@app.command()
def up(
    cluster: ClusterName = "tandem",
    kubeconfig: Kubeconfig = None,
    manifest: Annotated[
        Path | None, typer.Option("--manifest", "-f", help="Default: examples/quickstart.yaml.")
    ] = None,
    chart: Annotated[Path | None, typer.Option(help="Default: charts/tandem.")] = None,
    prompt: Annotated[
        str, typer.Option(help="What to ask the model at the end.")
    ] = "The three largest cities in France are",
    timeout: Annotated[int, typer.Option(min=1, help="Seconds to wait for the service.")] = 600,
) -> None:
    """Cluster, operator and a first service; ends with the model's own answer."""
    from tandem_cli.up import bring_up

    bring_up(cluster, kubeconfig, manifest, chart, prompt, timeout)


@app.command()
def down(cluster: ClusterName = "tandem", kubeconfig: Kubeconfig = None) -> None:
    """Remove everything that `tandem up` started (caches are kept)."""
    from tandem_cli.down import take_down

    take_down(cluster, kubeconfig)


@app.command()
def uninstall(
    cluster: ClusterName = "tandem",
    kubeconfig: Kubeconfig = None,
    keep_services: Annotated[
        bool, typer.Option("--keep-services", help="Remove only the operators.")
    ] = False,
    timeout: Annotated[int, typer.Option(help="Seconds to wait for the services' end.")] = 300,
) -> None:
    """Take Tandem out of a cluster: services, operators (whatever their releases' names), CRDs."""
    from tandem_cli.uninstall import uninstall as take_out

    take_out(cluster, kubeconfig, keep_services, timeout)


@app.command()
def status(
    cluster: ClusterName = "tandem", kubeconfig: Kubeconfig = None, output: Output = "table"
) -> None:
    """Services with their pools, conditions and URL."""
    from tandem_cli.status import show_status

    show_status(cluster, kubeconfig, output)


@app.command()
def logs(
    service: Annotated[str, typer.Argument(help="InferenceService; `operator` for the operator.")],
    role: Role = None,
    namespace: Annotated[
        str | None, typer.Option("--namespace", "-n", help="Of the service; default: `default`.")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what comes.")] = False,
    tail: Annotated[int, typer.Option(min=-1, help="Lines per pod; -1: all.")] = 50,
    cluster: ClusterName = "tandem",
    kubeconfig: Kubeconfig = None,
) -> None:
    """Logs of a service's pods, each line with its pod's name."""
    from tandem_cli.logs import show_logs

    show_logs(cluster, kubeconfig, service, role, namespace, follow, tail)


@app.command()
def doctor(
    ctx: typer.Context,
    service: Annotated[
        str, typer.Argument(help="InferenceService whose workers to check; default: this machine.")
    ] = "",
    transfer: Annotated[
        Literal["Auto", "Shm", "Tcp", "CudaIpc", "Nixl", "Mooncake"],
        typer.Option(help="The transport that this machine is meant for; workers know theirs."),
    ] = "Auto",
    namespace: Namespace = "default",
    output: Output = "table",
    cluster: ClusterName = "tandem",
    kubeconfig: Kubeconfig = None,
) -> None:
    """What there is for moving KV: devices, links, memory, libraries; with remedies."""
    for name in ("transfer",) if service else ("namespace", "cluster", "kubeconfig"):
        if _is_given(ctx, name):
            what = "the workers of a service" if service else "this machine"
            raise CliError(f"--{name} has no effect on the check of {what}", "leave it out")
    from tandem_cli.doctor import examine_here, examine_workers

    if service:
        examine_workers(cluster, kubeconfig, service, namespace, output)
    else:
        examine_here(transfer, output)


@app.command()
def probe(
    service: Annotated[str, typer.Argument(help="InferenceService whose workers move KV.")],
    sender: Annotated[
        str, typer.Argument(metavar="[FROM]", help="Worker that sends; default: one per node.")
    ] = "",
    receiver: Annotated[
        str, typer.Argument(metavar="[TO]", help="Worker that receives; default: one per node.")
    ] = "",
    blocks: Annotated[int, typer.Option(min=1, help="KV blocks to move at once.")] = 64,
    namespace: Namespace = "default",
    output: Output = "table",
    cluster: ClusterName = "tandem",
    kubeconfig: Kubeconfig = None,
) -> None:
    """Move checksummed KV between workers: over what, how fast, and what would be better."""
    from tandem_cli.probe import probe_service

    probe_service(cluster, kubeconfig, service, sender, receiver, namespace, blocks, output)


@app.command()
def chat(
    ctx: typer.Context,
    service: Annotated[str, typer.Argument(help="InferenceService to talk to.")] = "quickstart",
    url: Annotated[str, typer.Option(help="Any OpenAI-compatible endpoint instead.")] = "",
    namespace: Namespace = "default",
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.7,
    complete: Annotated[
        bool, typer.Option("--complete", help="Plain completion, for base models.")
    ] = False,
    cluster: ClusterName = "tandem",
    kubeconfig: Kubeconfig = None,
) -> None:
    """Talk to a model; answers stream as they are made."""
    for name in ("service", "namespace", "cluster", "kubeconfig") if url else ():
        if _is_given(ctx, name):
            raise CliError(f"--url is the whole address, so {name} has no place", "leave it out")
    from tandem_cli.chat import Conversation, find_endpoint

    with find_endpoint(cluster, kubeconfig, service, namespace, url) as endpoint:
        Conversation(endpoint, max_tokens, temperature, complete).run()


@app.command()
def serve(
    model: Annotated[
        str, typer.Argument(help="hf://org/name, file:///path, package://…, mock://…")
    ],
    port: Annotated[
        int, typer.Option(min=1, max=65535, help="Port of the OpenAI endpoint.")
    ] = 8000,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    name: Annotated[str, typer.Option(help="Served model name; default: from the URI.")] = "",
    prefill: Annotated[int, typer.Option(min=0, help="Extra prefill workers (disaggregated).")] = 0,
    worker_option: Annotated[
        list[str] | None,
        typer.Option("--worker-option", help="Passed to tandem-worker, e.g. --kv-memory=4Gi."),
    ] = None,
) -> None:
    """One router and one worker without Kubernetes, for a first try or a benchmark."""
    from tandem_cli.serve import serve_model

    serve_model(model, host, port, name, prefill, worker_option or [])


@app.command(context_settings=PASS_THROUGH)
def kubectl(ctx: typer.Context) -> None:
    """The real kubectl, pointed at the cluster: `tandem kubectl get tisvc,tpool,pods`."""
    from tandem_cli.target import passthrough

    raise typer.Exit(passthrough("kubectl", ctx.args))


@app.command(context_settings=PASS_THROUGH)
def helm(ctx: typer.Context) -> None:
    """The real helm, pointed at the cluster: `tandem helm list -A`."""
    from tandem_cli.target import passthrough

    raise typer.Exit(passthrough("helm", ctx.args))


@debug_app.command("leases")
def debug_leases(
    service: Annotated[str, typer.Argument(help="InferenceService: all of its workers.")] = "",
    url: Annotated[str, typer.Option(help="One worker's HTTP port instead.")] = "",
    token_file: Annotated[
        Path | None, typer.Option("--token-file", help="With --url: file of its admin token.")
    ] = None,
    namespace: Namespace = "default",
    output: Output = "table",
    cluster: ClusterName = "tandem",
    kubeconfig: Kubeconfig = None,
) -> None:
    """Blocks, leases, epochs and fences of workers, by request."""
    from tandem_cli.leases import show_leases

    show_leases(cluster, kubeconfig, service, namespace, url, token_file, output)


@rollout_app.command("plan")
def rollout_plan(
    service: ServiceName,
    namespace: Namespace = "default",
    output: Output = "table",
    cluster: ClusterName = "tandem",
    kubeconfig: Kubeconfig = None,
) -> None:
    """The steps to come, or those of the roll-out that an edit would start."""
    from tandem_cli.rollout import show_plan

    show_plan(cluster, kubeconfig, service, namespace, output)


@rollout_app.command("pause")
def rollout_pause(
    service: ServiceName,
    namespace: Namespace = "default",
    cluster: ClusterName = "tandem",
    kubeconfig: Kubeconfig = None,
) -> None:
    """Keep the revisions as they are; workers that die are replaced in their own."""
    from tandem_cli.rollout import set_paused

    set_paused(cluster, kubeconfig, service, namespace, paused=True)


@rollout_app.command("resume")
def rollout_resume(
    service: ServiceName,
    namespace: Namespace = "default",
    cluster: ClusterName = "tandem",
    kubeconfig: Kubeconfig = None,
) -> None:
    """Go on where `tandem rollout pause` stopped."""
    from tandem_cli.rollout import set_paused

    set_paused(cluster, kubeconfig, service, namespace, paused=False)


@cluster_app.command("build")
def cluster_build() -> None:
    """Build the embedded cluster's programs beforehand; `up` builds them too, if necessary."""
    from tandem_cli.cluster import build_programs

    build_programs()


@cluster_app.command("up")
def cluster_up(
    cluster: ClusterName = "tandem",
    nodes: Annotated[int, typer.Option(min=1, max=8, help="Number of nodes.")] = 1,
    gpus: Annotated[int, typer.Option(min=0, help="nvidia.com/gpu advertised per node.")] = 8,
    rdma: Annotated[int, typer.Option(min=0, help="rdma/ib advertised per node.")] = 0,
) -> None:
    """Start the embedded cluster (built on first use; about seven minutes on two cores)."""
    from tandem_cli.cluster import start_cluster

    start_cluster(cluster, nodes, gpus, rdma)


@cluster_app.command("down")
def cluster_down(cluster: ClusterName = "tandem") -> None:
    """Stop the embedded cluster and remove its namespaces, mounts and state."""
    from tandem_cli.down import take_down

    take_down(cluster, None)


@cluster_app.command("status")
def cluster_status(cluster: ClusterName = "tandem", output: Output = "table") -> None:
    """Components, nodes and resource use of the embedded cluster."""
    from tandem_cli.cluster import show_cluster

    show_cluster(cluster, output)


@cluster_app.command("kubeconfig")
def cluster_kubeconfig(cluster: ClusterName = "tandem") -> None:
    """Print the path of the admin kubeconfig: `export KUBECONFIG=$(tandem cluster kubeconfig)`."""
    from tandem_cli.target import find_target

    typer.echo(find_target(cluster, None).kubeconfig)


def main() -> None:
    """Entry point of the `tandem` command. An error that a user can fix ends it with code 1."""
    from tandem_cli.console import print_error
    from tandem_local.errors import LocalError

    try:
        if sys.argv[1:2] in (["kubectl"], ["helm"]):
            # As they are: the parser would swallow the `--` of `kubectl exec POD -- COMMAND`.
            from tandem_cli.target import passthrough

            sys.exit(passthrough(sys.argv[1], sys.argv[2:]))
        app()
    except CliError as error:
        print_error(error)
        sys.exit(1)
    except LocalError as error:
        print_error(CliError(str(error)))
        sys.exit(1)


if __name__ == "__main__":
    main()
