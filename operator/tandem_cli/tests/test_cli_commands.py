"""The command line itself: help, what a user is told when something is missing, lazy imports."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tandem_cli import main
from tandem_cli.errors import CliError

runner = CliRunner()


@pytest.mark.parametrize(
    "command",
    ["up", "down", "uninstall", "status", "logs", "chat", "serve", "cluster", "kubectl", "helm"],
)
def test_help_teaches_every_command(command: str) -> None:
    shown = runner.invoke(main.app, ["--help"])
    assert shown.exit_code == 0
    assert command in shown.output


@pytest.mark.parametrize("command", ["up", "uninstall", "status", "logs", "chat", "serve"])
def test_every_option_is_described(command: str) -> None:
    shown = runner.invoke(main.app, [command, "--help"])
    assert shown.exit_code == 0
    assert "Usage" in shown.output


def test_importing_the_command_loads_no_heavy_package() -> None:
    script = (
        "import sys, tandem_cli.main;"
        "heavy = {'torch', 'transformers', 'kopf', 'kubernetes', 'httpx', 'tandem_local'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["tandem", *arguments])
    with pytest.raises(SystemExit) as ended:
        main.main()
    code = ended.value.code
    return code if isinstance(code, int) else 1


def test_no_cluster_is_told_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("TANDEM_STATE_DIR", str(tmp_path))
    monkeypatch.delenv("TANDEM_KUBECONFIG", raising=False)
    assert run_main(monkeypatch, "status", "--cluster", "nowhere") == 1
    told = capsys.readouterr().err
    assert "no cluster named 'nowhere' is running" in told
    assert "tandem cluster up" in told


def test_a_missing_kubeconfig_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    absent = tmp_path / "absent"
    assert run_main(monkeypatch, "status", "--kubeconfig", str(absent)) == 1
    assert "absent" in capsys.readouterr().err


def test_up_wants_a_manifest_with_a_service(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    manifest = tmp_path / "empty.yaml"
    manifest.write_text("kind: ConfigMap\n")
    assert run_main(monkeypatch, "up", "-f", str(manifest)) == 1
    assert "has no InferenceService" in capsys.readouterr().err


def test_a_file_that_only_a_checkout_has() -> None:
    from tandem_cli.target import repository_file

    assert repository_file("charts/tandem", "--chart").is_dir()
    with pytest.raises(CliError, match=r"nothing\.yaml") as refused:
        repository_file("nothing.yaml", "--manifest")
    assert "--manifest" in refused.value.remedy
