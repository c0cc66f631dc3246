"""Kills one of two ranks during a step: `python -m tandem_engine.tests.killed_rank MODEL`.

It is a process of its own, since the code under test may hang where no signal reaches it.
"""

import faulthandler
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Final

from tandem_engine.config import WorkerConfig
from tandem_engine.load.runner import load_runner
from tandem_engine.parallel.runner import ParallelRunner
from tandem_engine.startup import Startup
from tandem_engine.step import Batch, BatchItem, Runner
from tandem_engine.tests.step_driver import GREEDY, Blocks, generate

SECONDS: Final = 40.0
"""After this long it writes where every thread is."""
PROMPT: Final = [5, 9, 31, 7, 12]


def load(model: Path) -> Runner:
    config = WorkerConfig(
        model=f"file://{model}",
        device="cuda",
        dtype="Float32",
        page_size=16,
        max_running=4,
        max_batched_tokens=64,
        chunk_tokens=64,
        max_model_len=256,
        kv_memory_bytes=16 << 20,
        tensor_parallel=2,
    )
    return load_runner(config, Startup(), lambda account: None)


def main() -> None:
    """Print "closed" once the runner is closed, and end."""
    logging.basicConfig(level=logging.INFO)
    faulthandler.dump_traceback_later(SECONDS)
    runner = load(Path(sys.argv[1]))
    assert isinstance(runner, ParallelRunner)
    generate(runner, [PROMPT], 2)
    rank = runner.group.ranks[0]
    os.kill(rank.pid, signal.SIGSTOP)
    blocks = Blocks(runner, 16).take(len(PROMPT) + 1)
    # A decode step, since it is a graph: launching a step without one may itself wait.
    runner.launch(Batch([BatchItem("r", PROMPT[:1], len(PROMPT), blocks, True, GREEDY)]))
    os.kill(rank.pid, signal.SIGKILL)
    while rank.is_alive:
        time.sleep(0.01)
    runner.close()
    print("closed", flush=True)


if __name__ == "__main__":
    main()
