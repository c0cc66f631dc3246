"""Every environment variable of Tandem's own is read by some code, and docs/environment.md has it.

`pytest -s` prints the list.
"""

import ast
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from tandem_operator.api.rdma import RdmaMode
from tandem_operator.facts.observed import PoolView
from tandem_operator.manifests.fleet import build_owner
from tandem_operator.manifests.router import build_router
from tandem_operator.manifests.wiring import Wiring
from tandem_operator.manifests.worker import Blueprint, build_worker_pod
from tandem_operator.names import pods
from tandem_operator.pair import Pair, Role
from tandem_operator.tests.facts import make_observed, make_spec
from tests.reading import ROOT, SOURCES, last_name, modules, texts

NAME = re.compile(r"TANDEM_[A-Z][A-Z_]*[A-Z]")
DOCUMENT = "docs/environment.md"
# Looked for in /proc/PID/environ, where no call of the environment's shows it.
FOUND_BY_LOOKING_AT_PROCESSES = {
    "TANDEM_CLUSTER_FOLDER": "e2e/tandem_local/supervision/teardown.py"
}
# The code of a worker and of a router.
OF_WORKERS = ("engine/tandem_engine/", "engine/tandem_wire/")
OF_ROUTERS = ("engine/tandem_router/", "engine/tandem_wire/")


@cache
def constants() -> dict[str, str]:
    """Names of variables in constants, such as ENV_CACHE_DIR, by the constant's name."""
    found: dict[str, str] = {}
    for package in SOURCES:
        for tree in modules(package).values():
            for node in tree.body:
                targets = node.targets if isinstance(node, ast.Assign) else []
                targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
                value = getattr(node, "value", None)
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    found |= {
                        name.id: value.value for name in targets if isinstance(name, ast.Name)
                    }
    return found


def variable(node: ast.AST) -> str:
    """The variable that an argument names, by itself or through a constant."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    return constants().get(node.id, "") if isinstance(node, ast.Name) else ""


def reads(tree: ast.AST) -> Iterator[str]:
    """Variables that are taken from an environment, or given to typer for an option."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            holder = last_name(node.func.value)
            if node.func.attr == "get" and holder in ("environ", "env") and node.args:
                yield variable(node.args[0])
        if isinstance(node, ast.Subscript) and last_name(node.value) in ("environ", "env"):
            yield variable(node.slice) if isinstance(node.ctx, ast.Load) else ""
        if isinstance(node, ast.keyword) and node.arg == "envvar":
            yield variable(node.value)


@cache
def readers() -> dict[str, set[str]]:
    """The files that read each variable: all code, and the end-to-end tests' own settings."""
    trees = {path: tree for package in SOURCES for path, tree in modules(package).items()}
    settings = ROOT / "e2e/tests/conftest.py"
    trees[settings] = ast.parse(settings.read_text())
    found: dict[str, set[str]] = {}
    for path, tree in trees.items():
        for name in reads(tree):
            found.setdefault(name, set()).add(str(path.relative_to(ROOT)))
    for name, place in FOUND_BY_LOOKING_AT_PROCESSES.items():
        assert "MARKER" in (ROOT / place).read_text()
        found[name] = {place}
    return found


def mentioned() -> dict[str, set[str]]:
    """Every variable in any file that could write one, in code only where it is the whole text."""
    found: dict[str, set[str]] = {}
    for package in SOURCES:
        for path, text in texts(package):
            if NAME.fullmatch(text):
                found.setdefault(text, set()).add(str(path.relative_to(ROOT)))
    patterns = ["*.yaml", "*.tpl", "*.go", "*.md", "Dockerfile", "Makefile", ".ci"]
    done = subprocess.run(
        ["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in done.stdout.split():
        if not Path(name).match("operator/tandem_operator/tests/*/*") and name != "CHANGELOG.md":
            for word in NAME.findall((ROOT / name).read_text()):
                found.setdefault(word, set()).add(name)
    return found


def test_every_variable_is_read() -> None:
    found = mentioned()
    for name in sorted(found):
        print(f"{name}: read in {', '.join(sorted(readers().get(name, ())))}")
    print(len(found), "variables")
    assert {name: places for name, places in found.items() if name not in readers()} == {}


def test_every_variable_is_documented() -> None:
    documented = set(NAME.findall((ROOT / DOCUMENT).read_text()))
    own = {name for name in readers() if NAME.fullmatch(name)}
    assert documented == own


def variables_of(containers: list[dict[str, Any]]) -> set[str]:
    """What is in the environment, but for what libraries read (NCCL, huggingface_hub, OpenMP)."""
    own = {value for name, value in vars(pods).items() if name.startswith("ENV_")}
    return {each["name"] for made in containers for each in made.get("env", ())} & own


def test_what_the_operator_writes_into_pods_is_read_there() -> None:
    spec = make_spec(
        model={"uri": "hf://org/name", "cache": {"claimName": "models"}},
        rdma={"mode": "DevicePlugin", "devices": {"include": ["mlx5_0"]}},
    )
    pools = Pair.build(lambda role: PoolView(f"qwen-{role}", str(role), 1, 1, 1))
    observed = make_observed(spec, pools=pools)
    wiring = Wiring(RdmaMode.DEVICE_PLUGIN, "rdma/ib")
    made = Blueprint(Role.DECODE, "qwen-decode-a", "r1", wiring)
    worker = build_worker_pod(observed, spec, made)["spec"]["containers"]
    deployment = build_router(observed, spec, "r1", build_owner(observed))
    (router,) = (
        each["spec"]["template"]["spec"]["containers"]
        for each in deployment
        if each["kind"] == "Deployment"
    )
    assert {pods.ENV_NICS, pods.ENV_NIC_MAP} <= variables_of(worker)
    for place, written in ((OF_WORKERS, variables_of(worker)), (OF_ROUTERS, variables_of(router))):
        assert pods.ENV_POD_NAME in written
        for name in written:
            places = {each for each in readers().get(name, ()) if each.startswith(place)}
            assert places, f"the operator writes {name}, and nothing in {place} reads it"
