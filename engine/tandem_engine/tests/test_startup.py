"""The timeline of a start."""

import os
import subprocess
import sys

import msgspec
import pytest

from tandem_engine.frames import CoreReady
from tandem_engine.startup import StartReport, Startup, boot_seconds, process_start


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_every_second_belongs_to_one_stage() -> None:
    clock, told = Clock(), []
    startup = Startup(lambda stage, part: told.append((stage, part)), 94.0, clock)
    startup("importing", 0.0)
    clock.now = 101.0
    startup("model files", 0.0)
    clock.now = 101.5
    startup("torch", 0.0)
    clock.now = 103.0
    for step in range(4):
        startup("weights", step / 4)
        clock.now += 1.0
    startup.count_weights(20_000_000_000)
    startup("graphs", 0.0)
    clock.now += 2.5
    report = startup.report()
    assert report.stages == {"import": 8.5, "model files": 0.5, "weights": 4.0, "graphs": 2.5}
    assert list(report.stages) == ["import", "model files", "weights", "graphs"]
    assert report.seconds == 15.5 == clock.now - 94.0
    assert report.describe() == (
        "started in 15.5 s: import 8.5, model files 0.5, weights 4.0 (5.0 GB/s), graphs 2.5"
    )
    assert ("torch", 0.0) in told
    assert ("weights", 0.75) in told


def test_a_report_may_be_taken_on_the_way() -> None:
    clock = Clock()
    startup = Startup(clock=clock)
    assert startup.report() == StartReport({"import": 0.0})
    assert startup.report().describe() == "started in 0.0 s: import 0.0"
    clock.now += 2
    startup("weights", 0.0)
    clock.now += 1
    assert startup.report().stages == {"import": 2.0, "weights": 1.0}
    clock.now += 1
    assert startup.report().stages == {"import": 2.0, "weights": 2.0}


def test_a_report_travels_to_the_server() -> None:
    ready = CoreReady(
        max_model_len=1,
        page_size=1,
        num_blocks=1,
        vocab_size=1,
        eos_token_ids=[],
        compatibility_hash="",
        bootstrap_port=0,
        startup=StartReport({"import": 1.25, "weights": 0.5}, 7),
    )
    decoded = msgspec.msgpack.decode(msgspec.msgpack.encode(ready), type=CoreReady)
    assert decoded == ready
    assert decoded.startup is not None
    assert decoded.startup.as_json() == {
        "seconds": 1.75,
        "stages": {"import": 1.25, "weights": 0.5},
        "num_weight_bytes": 7,
    }


def test_a_process_knows_when_it_was_started() -> None:
    before = boot_seconds()
    code = "from tandem_engine.startup import process_start; print(process_start())"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    tick = 1 / os.sysconf("SC_CLK_TCK")
    assert before - tick <= float(found) <= boot_seconds()
    assert process_start() < before


@pytest.mark.parametrize(
    "module", ["tandem_engine.main", "tandem_engine.server.serving", "tandem_engine.core.child"]
)
def test_neither_process_imports_torch_before_it_must(module: str) -> None:
    code = f"import sys, {module}; print([n for n in sys.modules if n in {HEAVY!r}])"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert found.strip() == "[]"


HEAVY = ("torch", "triton", "transformers", "safetensors", "gguf", "tokenizers")
