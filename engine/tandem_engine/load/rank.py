"""One rank's runner. Imports torch only when called."""

import os

from tandem_engine.load.cores import count_cores
from tandem_engine.load.files import find_files
from tandem_engine.parallel.messages import RankStart
from tandem_engine.startup import Startup
from tandem_engine.step import Runner
from tandem_wire.model_config import read_model_facts


def load_rank(start: RankStart, progress: Startup) -> Runner:
    """One rank's runner.

    Raises:
        ModelSourceError: the model can't be found, downloaded or read (with a remedy).
        ConfigError: the configuration doesn't fit the model or the machine.
    """
    files = find_files(start.config, progress)
    facts = read_model_facts(files.path)
    progress("torch", 0.0)
    _limit_threads(start.config.tensor_parallel)
    from tandem_engine.load.context import open_context

    context = open_context(start, files, facts, progress)
    try:
        if context.device.type == "cuda":
            from tandem_engine.load.cuda import load_cuda

            return load_cuda(context)
        from tandem_engine.load.host import load_host

        return load_host(context)
    except BaseException:
        if start.rank == 0:  # the others' processes end, this one may go on
            context.collective.abort()
        raise


def _limit_threads(num_ranks: int) -> None:
    """Share the cores that the worker may use among its ranks.

    Threads that wait must sleep: workers share cores, and a spinning thread slows the others down.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    threads = os.environ.get("TANDEM_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS")
    cores = max(1, count_cores() // num_ranks)
    torch.set_num_threads(int(threads) if threads else cores)
