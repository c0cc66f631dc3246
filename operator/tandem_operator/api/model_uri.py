"""Where a model's weights come from, read from its URI."""

import re
from dataclasses import dataclass
from enum import StrEnum

PATTERN = (
    r"^(hf://[\w.-]+/[\w.-]+|pvc://[a-z0-9]([-a-z0-9.]*[a-z0-9])?(/.*)?|file:///.+|s3://.+|oci://.+"
    r"|package://[a-zA-Z0-9][\w.-]*"
    r"|mock://[a-z0-9][a-z0-9.-]*([?][a-z_]+=[0-9.e-]+(&[a-z_]+=[0-9.e-]+)*)?)$"
)


class ModelScheme(StrEnum):
    """The schemes that a model URI can have."""

    HF = "hf"
    PVC = "pvc"
    FILE = "file"
    S3 = "s3"
    OCI = "oci"
    PACKAGE = "package"
    MOCK = "mock"


@dataclass(frozen=True)
class ModelUri:
    """A model URI in its parts.

    | uri                  | authority      | path           |
    |----------------------|----------------|----------------|
    | `hf://org/name`      | `org/name`     | ``             |
    | `pvc://claim/a/b`    | `claim`        | `a/b`          |
    | `file:///models/x`   | ``             | `/models/x`    |
    | `s3://bucket/prefix` | `bucket`       | `prefix`       |
    | `oci://registry/i:t` | `registry/i:t` | ``             |
    | `package://name`     | `name`         | ``             |
    | `mock://profile?k=1` | `profile?k=1`  | ``             |
    """

    scheme: ModelScheme
    authority: str
    path: str

    @classmethod
    def parse(cls, uri: str) -> "ModelUri":
        """Split `uri`. Raises ValueError when it is not the URI of a model."""
        if not re.match(PATTERN, uri):
            raise ValueError(f"{uri!r} is not a model URI: write it like hf://org/name")
        scheme_text, _, rest = uri.partition("://")
        scheme = ModelScheme(scheme_text)
        if scheme is ModelScheme.FILE:
            return cls(scheme, "", rest)
        if scheme in (ModelScheme.PVC, ModelScheme.S3):
            authority, _, path = rest.partition("/")
            return cls(scheme, authority, path)
        return cls(scheme, rest, "")
