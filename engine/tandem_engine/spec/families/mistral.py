"""Mistral, and Mixtral, whose layers have experts."""

from tandem_engine.spec.families.config_reader import ConfigReader
from tandem_engine.spec.model import ModelSpec
from tandem_engine.spec.moe import ExpertNames, MoeSpec


def mistral(config: ConfigReader) -> ModelSpec:
    """The spec of a mistral model."""
    windows = config.windows(config.get("sliding_window"))
    return ModelSpec(**config.shape(), **config.one_rope(windows, 10000.0))


def mixtral(config: ConfigReader) -> ModelSpec:
    """The spec of a mixtral model: every layer has experts, and the window if there is one."""
    shape = config.shape()
    moe = MoeSpec(
        num_experts=int(config.get("num_local_experts", config.get("num_experts", 8))),
        intermediate_size=shape["intermediate_size"],
        top_k=int(config.get("num_experts_per_tok", 2)),
        sparse=(True,) * shape["num_layers"],
        renormalise=True,
        names=ExpertNames("block_sparse_moe", "w1", "w3", "w2"),
    )
    windows = [config.get("sliding_window")] * shape["num_layers"]
    return ModelSpec(**shape, **config.one_rope(windows, 1_000_000.0), moe=moe)
