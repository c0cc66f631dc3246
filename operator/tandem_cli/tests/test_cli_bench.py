"""`tandem bench`: the command line, and real runs against a router on this machine."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from deadlines import patience
from typer.testing import CliRunner

from tandem_bench.catalog import BENCHMARKS
from tandem_bench.record import Objectives
from tandem_bench.report.document import read_report, write_report
from tandem_bench.report.page import build_page
from tandem_bench.serve.campaign import Campaign, measure
from tandem_bench.serve.generator import Counters, LoadSettings
from tandem_bench.tests.scripted_endpoint import ScriptedEndpoint
from tandem_bench.workload.random_lengths import RandomLengths
from tandem_bench.workload.trace_rows import Trace, TraceRow
from tandem_cli import main
from tandem_router.tests.fake_worker import FakeWorker
from tandem_router.tests.harness import router

runner = CliRunner()


def quiet(_number: int, _label: str, _total: int) -> Callable[[Counters], None]:
    return lambda _: None


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["tandem", *arguments])
    with pytest.raises(SystemExit) as ended:
        main.main()
    code = ended.value.code
    return code if isinstance(code, int) else 0


WITH_JSON = {
    "serve",
    "compare",
    "offline",
    "soak",
    "step",
    "kernels",
    "tune",
    "tune-moe",
    "peer-memory",
}


@pytest.mark.parametrize("command", [benchmark.name for benchmark in BENCHMARKS])
def test_help_teaches_every_benchmark(command: str) -> None:
    shown = runner.invoke(main.app, ["bench", command, "--help"])
    assert shown.exit_code == 0
    assert ("--json" in shown.output) == (command in WITH_JSON)


def test_the_list_of_benchmarks_imports_none_of_them() -> None:
    script = (
        "import sys; from typer.testing import CliRunner; from tandem_cli.main import app;"
        "shown = CliRunner().invoke(app, ['bench', '--help']).output;"
        "assert 'handoff-gpu' in shown, shown;"
        "assert not {'torch', 'numpy', 'tandem_engine'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


async def test_a_run_against_a_router_and_its_worker(tmp_path: Path) -> None:
    worker = FakeWorker(step_seconds=0.002)
    async with router(worker) as running:
        campaign = Campaign(
            url=running.url,
            rates=(200.0,),
            lengths=RandomLengths(input_range=(8, 40), output_range=(2, 9), prefix_share=0.5),
            load=LoadSettings(num_requests=60, warmup=1, extra={"ignore_eos": True}),
            objectives=Objectives(ttft=30.0, tbt=30.0),
        )
        report = await measure(campaign, None, quiet, lambda _: None, "tandem bench serve")
    summary = report.runs[0].summary
    assert (summary.completed, summary.failed) == (60, 0)
    assert report.config["model"] == "mock"
    assert report.config["prompts"] == "ids"
    assert summary.output_tokens == sum(row.output_tokens for row in report.runs[0].requests)
    assert summary.goodput is not None
    assert summary.goodput.share == 1.0
    write_report(report, tmp_path / "run.json")
    assert "</html>" in build_page([("", read_report(tmp_path / "run.json"))], campaign.objectives)


async def test_a_trace_against_a_router_shares_its_prefixes() -> None:
    rows = [TraceRow(number / 100, 200, 3, (0, number)) for number in range(30)]
    seen: list[list[int]] = []
    worker = FakeWorker()
    async with router(worker) as running:
        campaign = Campaign(url=running.url, load=LoadSettings(extra={"ignore_eos": True}))
        report = await measure(
            campaign, Trace("small", rows, 100), quiet, lambda _: None, "tandem bench serve"
        )
        seen += [submit.tokens for submit in worker.submits]
    assert report.runs[0].summary.completed == 30
    long = [tokens for tokens in seen if len(tokens) == 200]
    assert len(long) == 30
    assert len({tuple(tokens[:100]) for tokens in long}) == 1
    assert len({tuple(tokens) for tokens in long}) == 30


def test_the_command_measures_writes_and_compares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import threading

    ready, stop = threading.Event(), threading.Event()
    endpoint = ScriptedEndpoint()

    async def serve() -> None:
        async with endpoint.serving():
            ready.set()
            await asyncio.to_thread(stop.wait)

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        ready.wait(patience(20))
        for name in ("a", "b"):
            code = run_main(
                monkeypatch, "bench", "serve", "--url", endpoint.url, "--rates", "100,200",
                "--num-requests", "10", "--input-len", "4-8", "--output-len", "3",
                "--slo-ttft", "9999",
                "--json", str(tmp_path / f"{name}.json"), "--html", str(tmp_path / f"{name}.html"),
                "--api-key", "very-secret",
            )  # fmt: skip
            assert code == 0
    finally:
        stop.set()
        thread.join()
    told = capsys.readouterr()
    assert "goodput" in told.out
    assert "20" in told.out
    document = (tmp_path / "a.json").read_text()
    assert len(json.loads(document)["runs"]) == 2
    assert "very-secret" not in document
    code = run_main(
        monkeypatch, "bench", "serve", "--compare", str(tmp_path / "a.json"),
        str(tmp_path / "b.json"), "--html", str(tmp_path / "both.html"),
    )  # fmt: skip
    assert code == 0
    assert "ratio" in capsys.readouterr().out
    assert "TTFT against rate" in (tmp_path / "both.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rate", "1", "--rates", "1,2"], "exclude each other"),
        (["--rates", "1,x"], "not a list"),
        (["--rate", "1"], "when to end"),
        (["--num-requests", "3"], "when to send"),
        (["--rate", "1", "--num-requests", "1", "--input-len", "x"], "not a length"),
        (["--rate", "1", "--num-requests", "1", "--extra-body", "[1]"], "not a JSON object"),
        (["--rate", "1", "--num-requests", "1", "--dataset", "x"], "unknown"),
        (["--rate", "1", "--num-requests", "1", "--prompts", "x"], "unknown"),
        (["--trace", "nowhere.csv"], "can't be read"),
        (["--compare", "a.json", "b.json"], "not a report"),
    ],
)
def test_wrong_options_are_errors_with_a_remedy(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_main(monkeypatch, "bench", "serve", *arguments) == 1
    told = capsys.readouterr().err
    assert message in told
    assert "remedy" in told


TINY: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 199,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


def test_offline_runs_a_real_model_with_made_up_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    code = run_main(
        monkeypatch, "bench", "offline", "--model", f"file://{tmp_path}", "--format", "Dummy",
        "--num-seqs", "6", "--input-len", "4-40", "--output-len", "2-9", "--kv-memory", "8Mi",
        "--device", "cpu", "--json", str(tmp_path / "out.json"),
    )  # fmt: skip
    assert code == 0
    assert "output tokens/s" in capsys.readouterr().out
    run = json.loads((tmp_path / "out.json").read_text())["runs"][0]
    assert run["num_seqs"] == 6
    assert 12 <= run["output_tokens"] <= 54


def test_offline_names_what_the_worker_refuses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, "bench", "offline", "--model", "llama-9b") == 1
    assert "llama-8b" in capsys.readouterr().err
    assert run_main(monkeypatch, "bench", "offline", "--model", "mock://tiny", "--nonsense") == 1
    assert "nonsense" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["kernels", "step"])
def test_kernels_without_a_gpu_name_the_remedy(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run_main(monkeypatch, "bench", command) == 1
    told = capsys.readouterr().err
    assert "GPU" in told
    assert "remedy" in told
