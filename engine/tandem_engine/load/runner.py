"""The way in: a runner from a worker's configuration. Imports torch only when called."""

from collections.abc import Callable

from tandem_engine.config import WorkerConfig
from tandem_engine.load.rank import load_rank
from tandem_engine.parallel.messages import RankStart
from tandem_engine.startup import Startup
from tandem_engine.step import Runner


def load_runner(
    config: WorkerConfig, progress: Startup, fail: Callable[[str], None] | None = None
) -> Runner:
    """Find the model's files, load its weights and make the KV cache.

    With `tensor_parallel` > 1 this process becomes the first rank and starts the others. `fail` is
    called when one of them dies while no call of the runner can report it; by default the process
    ends.

    Raises:
        ModelSourceError: the model can't be found, downloaded or read (with a remedy).
        ConfigError: the configuration doesn't fit the model or the machine.
        RankDiedError: a rank couldn't start.
    """
    if config.tensor_parallel > 1:
        from tandem_engine.load.ranks import load_ranks

        runner = load_ranks(config, progress, fail)
    else:
        runner = load_rank(RankStart(config, 0, ""), progress)
    progress("ready", 1.0)
    return runner
