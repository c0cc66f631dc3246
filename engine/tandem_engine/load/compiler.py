"""What Triton needs on the machine beside the GPU: a C compiler, and a folder for what it makes.

Triton compiles the code that launches a kernel with a C compiler when the kernel is first used, and
there is no other way to launch it. So a worker on a GPU cannot do without one.
"""

import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from tandem_engine.errors import ConfigError

_COMPILERS: Final = ("gcc", "clang")
"""In the order in which Triton looks for them."""
_PROBE: Final = "#include <Python.h>\n#include <stdlib.h>\n"
_REMEDY: Final = (
    "install gcc, libc6-dev and Python's headers in the engine image, or use --device cpu"
)


def check_compiler(cache: Path, environ: Mapping[str, str] = os.environ) -> None:
    """See, by compiling almost nothing, that a launcher can be compiled and kept in `cache`.

    Raises:
        ConfigError: it can't, with the reason and the remedy.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
        work = tempfile.TemporaryDirectory(prefix="probe-", dir=cache)
    except OSError as error:
        raise ConfigError(
            f"Triton's cache {cache} can't be written ({error.strerror}): set TRITON_CACHE_DIR to "
            "a folder that this user can write"
        ) from error
    with work as folder:
        _compile(_find_compiler(environ), Path(folder))


def _find_compiler(environ: Mapping[str, str]) -> str:
    path = environ.get("PATH", os.defpath)
    if chosen := environ.get("CC"):
        if shutil.which(chosen, path=path) is None:
            raise ConfigError(
                f"CC is {chosen}, and there is no such program: unset it, or correct it"
            )
        return chosen
    for name in _COMPILERS:
        if found := shutil.which(name, path=path):
            return found
    raise ConfigError(f"there is no C compiler, which Triton needs to launch kernels: {_REMEDY}")


def _compile(compiler: str, folder: Path) -> None:
    source, library = folder / "probe.c", folder / "probe.so"
    source.write_text(_PROBE)
    include = sysconfig.get_paths()["include"]
    command = [compiler, "-shared", "-fPIC", f"-I{include}", str(source), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        complaint = next(
            (line for line in done.stderr.splitlines() if "error" in line), done.stderr
        )
        raise ConfigError(
            f"{compiler} can't compile what Triton needs to launch kernels ({complaint.strip()}): "
            f"{_REMEDY}"
        )
