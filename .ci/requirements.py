"""What an image installs beside the wheel: ``python requirements.py EXTRA,EXTRA < pyproject.toml``.

Read from the project's own table, and printed without the rest of it, so that an image's layer of
dependencies changes only when a dependency does. Only the standard library.
"""

import sys
import tomllib
from typing import Any


def list_requirements(project: dict[str, Any], extras: str) -> list[str]:
    """The dependencies of the project and of the named extras (comma-separated, may be empty).

    Raises ValueError for an extra that the project does not have.
    """
    known: dict[str, list[str]] = project["optional-dependencies"]
    wanted = [name.strip() for name in extras.split(",") if name.strip()]
    for name in wanted:
        if name not in known:
            raise ValueError(
                f"there is no extra {name!r}: choose from {', '.join(known)}, as in engine,gpu"
            )
    return [*project["dependencies"], *(line for name in wanted for line in known[name])]


def main() -> None:
    """Print one requirement per line."""
    project = tomllib.load(sys.stdin.buffer)["project"]
    try:
        lines = list_requirements(project, sys.argv[1])
    except ValueError as error:
        sys.exit(f"requirements.py: {error}")
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
