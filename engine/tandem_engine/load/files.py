"""Where a worker's files are: the model's, and the cache of converted weights. Free of torch."""

from pathlib import Path
from typing import Literal

from tandem_engine.config import WorkerConfig
from tandem_engine.errors import ConfigError
from tandem_engine.startup import Startup
from tandem_wire.disk_cache import default_cache_dir
from tandem_wire.model_source import ModelFiles, resolve_model


def find_files(config: WorkerConfig, progress: Startup) -> ModelFiles:
    """The model's files on this machine, downloaded first if need be.

    Raises:
        ModelSourceError: there is no such model, or it can't be downloaded.
    """
    progress("model files", 0.0)
    return resolve_model(
        config.model,
        revision=config.revision,
        weights=config.format != "Dummy",
        cache_dir=find_cache(config),
        progress=lambda fraction: progress("model files", fraction),
    )


def find_cache(config: WorkerConfig) -> Path:
    """The directory for downloads and converted weights."""
    return Path(config.cache_dir) if config.cache_dir else default_cache_dir()


def find_format(config: WorkerConfig, files: ModelFiles) -> Literal["Safetensors", "Gguf", "Dummy"]:
    """The form of the weights: that of the files, or random ones where those are asked for.

    Raises:
        ConfigError: another form was asked for than the files have.
    """
    if config.format in ("Auto", files.format):
        return files.format
    if config.format == "Dummy":
        return "Dummy"
    raise ConfigError(
        f"--format is {config.format}, but the weights in {files.path} are {files.format}; "
        "use --format Auto"
    )
