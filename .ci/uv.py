"""uv with the indexes and certificates of pip: ``python .ci/uv.py ARGUMENTS``.

uv reads neither pip.conf nor PIP_INDEX_URL, so behind a mirror it would ask the public index. What
uv's own variables say stays. Only the standard library: this runs before anything is installed.
"""

import ast
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

# From the weakest to the strongest, as in pip.
SECTIONS = ("global", "install", ":env:")
# pip's option, uv's variable.
LISTS = {"extra-index-url": "UV_INDEX", "trusted-host": "UV_INSECURE_HOST"}
VALUES = {
    "index-url": "UV_DEFAULT_INDEX",
    "cert": "SSL_CERT_FILE",
    "client-cert": "SSL_CLIENT_CERT",
    "proxy": "ALL_PROXY",
}
OTHER_NAMES = {"UV_DEFAULT_INDEX": "UV_INDEX_URL", "UV_INDEX": "UV_EXTRA_INDEX_URL"}


def read_settings(lines: Iterable[str]) -> dict[str, str]:
    """The options that `pip config list` prints, each as its strongest section has it."""
    found: dict[str, tuple[int, str]] = {}
    for line in lines:
        name, separator, value = line.partition("=")
        section, _, option = name.rpartition(".")
        if separator and section in SECTIONS:
            rank = SECTIONS.index(section)
            if rank >= found.get(option, (-1, ""))[0]:
                found[option] = rank, str(ast.literal_eval(value))
    return {option: value for option, (_, value) in found.items()}


def build_environment(settings: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    """uv's variables for pip's settings, without those that `own` has already."""
    wanted = {VALUES[option]: value for option, value in settings.items() if option in VALUES}
    wanted |= {LISTS[o]: " ".join(value.split()) for o, value in settings.items() if o in LISTS}
    if "extra-index-url" in settings:
        # pip takes the best version of all indexes.
        wanted["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    # pip passes over a folder that isn't there; to uv it is an error.
    places = [
        place
        for place in settings.get("find-links", "").split()
        if "://" in place or Path(place).is_dir()
    ]
    if places:
        wanted["UV_FIND_LINKS"] = ",".join(places)
    return {
        name: value
        for name, value in wanted.items()
        if name not in own and OTHER_NAMES.get(name, name) not in own
    }


def main() -> None:
    """Become uv."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    environment = build_environment(read_settings(listed.splitlines()), os.environ)
    uv = Path(sys.executable).parent / "uv"
    os.execve(uv, [str(uv), *sys.argv[1:]], {**os.environ, **environment})


if __name__ == "__main__":
    main()
