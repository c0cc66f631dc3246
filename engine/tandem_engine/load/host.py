"""A rank on the CPU. Its KV cache has the size that the configuration asks for."""

from typing import Final

from tandem_engine.load.context import LoadContext
from tandem_engine.runner.host_kv import HostKVStore
from tandem_engine.runner.torch_runner import TorchRunner

_KV_BYTES: Final = 2 * 2**30
"""KV cache of a worker without --kv-memory."""


def load_host(context: LoadContext) -> TorchRunner:
    """The runner that a context describes.

    Raises:
        ModelSourceError: damaged, incomplete or unsupported files.
        ConfigError: --kv-memory is too small.
    """
    config, layout, collective = context.config, context.kv_layout, context.collective
    num_bytes = (config.kv_memory_bytes or _KV_BYTES) // config.tensor_parallel
    num_blocks = num_bytes // layout.block_bytes
    max_model_len = context.fit_length(num_blocks, "--kv-memory")
    parameters = context.load_parameters()
    context.progress("kv cache", 0.0)
    return TorchRunner(
        context.spec,
        parameters,
        HostKVStore(layout, num_blocks, context.dtype),
        eos_token_ids=context.facts.eos_token_ids,
        max_model_len=max_model_len,
        collective=collective,
    )
