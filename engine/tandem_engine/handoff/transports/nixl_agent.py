"""The library NIXL: whichever of its wheels is installed, and an agent of it."""

import importlib
import importlib.metadata
import os
from types import ModuleType
from typing import Any

from tandem_engine.handoff.errors import TransportError


def make_agent(name: str) -> Any:
    """An agent of the library, with UCX. Raises TransportError when this process can't have one."""
    library = _load()
    config = library.nixl_agent_config(
        enable_prog_thread=True,
        backends=["UCX"],
        sync_mode=library.nixl_thread_sync_t.NIXL_THREAD_SYNC_RW,
    )
    try:
        agent = library.nixl_agent(name, config)
    except Exception as error:  # the library's errors have no common base
        raise TransportError(f"can't make an agent of nixl: {error}") from error
    if "UCX" not in agent.backends:
        raise TransportError("nixl has no UCX here; install its wheel from PyPI")
    return agent


def version_of(agent: Any) -> str:
    """The version of the wheel that an agent comes from."""
    return importlib.metadata.version(type(agent).__module__.partition(".")[0])


def _load() -> ModuleType:
    """The library's module. Raises TransportError when it is not installed, or doesn't load."""
    os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")  # else it greets on standard output
    for name in ("nixl", "nixl_cu13", "nixl_cu12"):  # the first one takes that of torch's CUDA
        try:
            return importlib.import_module(f"{name}._api")
        except ModuleNotFoundError as error:
            if error.name not in (name, f"{name}._api"):
                raise TransportError(f"nixl can't be loaded: {error}") from error
        except ImportError as error:
            raise TransportError(f"nixl can't be loaded: {error}") from error
    raise TransportError("nixl is not installed; pip install 'tandem-inference[nixl]'")
