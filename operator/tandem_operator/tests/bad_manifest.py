"""Manifests that the API server must refuse, with the words that the refusal must hold."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent / "bad_manifests"


@dataclass(frozen=True)
class BadManifest:
    """One file: what is wrong, the field that the refusal names, words of its message."""

    path: Path
    what: str
    field: str
    message: str
    manifest: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> "BadManifest":
        """Read a file whose first three lines are comments: what, `field:`, `message:`."""
        text = path.read_text()
        what, field, message = (line.removeprefix("# ") for line in text.splitlines()[:3])
        return cls(
            path=path,
            what=what,
            field=field.removeprefix("field: "),
            message=message.removeprefix("message: "),
            manifest=yaml.safe_load(text),
        )


BAD_MANIFESTS = [BadManifest.read(path) for path in sorted(FOLDER.glob("*.yaml"))]
