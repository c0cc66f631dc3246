"""A worker whose model is divided among ranks: the other ranks started, and all joined as one."""

from collections.abc import Callable

import msgspec

from tandem_engine.config import WorkerConfig
from tandem_engine.load import member
from tandem_engine.load.files import find_files
from tandem_engine.load.rank import load_rank
from tandem_engine.parallel.group import RankGroup
from tandem_engine.parallel.kv_store import ParallelKVStore, StepCount
from tandem_engine.parallel.messages import RankStart
from tandem_engine.parallel.runner import ParallelRunner
from tandem_engine.spec.families import build_spec
from tandem_engine.startup import Startup
from tandem_engine.step import Runner
from tandem_wire.model_config import ModelFacts, read_model_facts


def load_ranks(
    config: WorkerConfig, progress: Startup, fail: Callable[[str], None] | None
) -> Runner:
    """Start the other ranks, load this process's own, and join them all.

    `fail` is called when a rank dies while no call can report it; None: this process ends.

    Raises:
        RankDiedError: another rank couldn't start.
        ModelSourceError, ConfigError: this rank couldn't be loaded.
    """
    facts = read_model_facts(find_files(config, progress).path)
    # Downloads are complete now. The other ranks import torch while this process does.
    group = RankGroup(config, member.__name__, fail)
    own: Runner | None = None
    try:
        own = load_rank(RankStart(config, 0, group.store), progress)
        group.wait_ready(own.num_blocks)
        return _join(config, facts, own, group)
    except Exception as error:
        cause = group.cause_of(error)
        group.close(grace_seconds=0.0)
        if own is not None:
            own.abandon()
        raise cause from error


def _join(config: WorkerConfig, facts: ModelFacts, own: Runner, group: RankGroup) -> Runner:
    """The runner of all ranks, whose pages are those of the whole model."""
    from tandem_engine.models.shard import Shard

    num_kv_heads, ranks = build_spec(facts).num_kv_heads, config.tensor_parallel
    heads = [Shard(rank, ranks).kv_heads(num_kv_heads) for rank in range(ranks)]
    layout = msgspec.structs.replace(own.kv.layout, num_kv_heads=num_kv_heads)
    steps = StepCount()
    kv = ParallelKVStore(own.kv, layout, heads, group, steps)
    return ParallelRunner(own, kv, group, steps)
