"""What a cluster should be: its nodes, their extended resources, and its images."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from tandem_local.errors import SpecError

MAX_NODES = 100
_QUANTITY = re.compile(r"(\d+\.?\d*|\.\d+)(?:([KMGTPE]i)|([numkMGTPE])|[eE]([+-]?\d+))?")
_DNS_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?")


def parse_quantity(text: str) -> Decimal:
    """The value of a quantity. The API server spells one its own way: 1000 comes back as 1k.

    Raises ValueError for text that is not a quantity.
    """
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a quantity: write it like 8 or 1k")
    number, binary, decimal, exponent = match.groups()
    factor = Decimal(10) ** int(exponent or 0)
    if binary:
        factor = Decimal(1024) ** ("KMGTPE".index(binary[0]) + 1)
    elif decimal:
        factor = Decimal(1000) ** ("num_kMGTPE".index(decimal) - 3)
    return Decimal(number) * factor


@dataclass(frozen=True)
class NodeSpec:
    """One node of the cluster."""

    name: str
    """The name of the Node object."""
    resources: Mapping[str, str] = field(default_factory=dict)
    """Extended resources to advertise, as quantities, e.g. ``{"nvidia.com/gpu": "8"}``."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """The labels of the Node object."""

    def __post_init__(self) -> None:
        _check_label("node name", self.name)
        for resource in self.resources:
            if "/" not in resource:
                raise SpecError(
                    f"node {self.name}: {resource!r} is not the name of an extended resource: "
                    "put its domain in front, as in nvidia.com/gpu"
                )
            try:
                pieces = parse_quantity(self.resources[resource])
            except ValueError as error:
                raise SpecError(f"node {self.name}: {resource}: {error}") from None
            if pieces % 1:
                raise SpecError(
                    f"node {self.name}: {resource} is {self.resources[resource]}, and extended "
                    "resources come in whole pieces: write it like 8 or 1k"
                )


@dataclass(frozen=True)
class ImageEntry:
    """An image name and what runs when a container of that image starts."""

    name: str
    """The full name with its tag; the tag ``*`` stands for any tag."""
    entrypoint: tuple[str, ...] = ()
    """The image's entry point; if empty, the pod's own command runs as it is."""
    env: Mapping[str, str] = field(default_factory=dict)
    """The image's environment; the pod's own variables override it."""
    working_dir: str = "/"
    """The directory in which the container starts."""
    user: int | None = None
    """The uid of the image's USER; None is root, as in an image without one."""
    files: tuple[str, ...] = ()
    """The machine's folders and files that the image consists of, beside its system; they can only
    be read, and no pod's volume hides them."""
    shared: tuple[str, ...] = ()
    """Folders of the machine that every container of the image writes to."""
    scratch: tuple[str, ...] = ()
    """Folders that every user may write; each container has its own, empty at its start."""
    hidden: tuple[str, ...] = ()
    """Programs of the machine's system that the image does not have."""

    def to_table(self) -> dict[str, Any]:
        """The entry in the form that procri reads."""
        entry: dict[str, Any] = {
            "name": self.name,
            "entrypoint": list(self.entrypoint),
            "env": dict(self.env),
            "workingDir": self.working_dir,
            "files": list(self.files),
            "shared": list(self.shared),
            "scratch": list(self.scratch),
            "hidden": list(self.hidden),
        }
        if self.user is not None:
            entry["user"] = self.user
        return entry

    @classmethod
    def from_table(cls, entry: Mapping[str, Any]) -> ImageEntry:
        """The inverse of `to_table`."""
        return cls(
            name=entry["name"],
            entrypoint=tuple(entry.get("entrypoint") or ()),
            env=dict(entry.get("env") or {}),
            working_dir=entry.get("workingDir") or "/",
            user=entry.get("user"),
            files=tuple(entry.get("files") or ()),
            shared=tuple(entry.get("shared") or ()),
            scratch=tuple(entry.get("scratch") or ()),
            hidden=tuple(entry.get("hidden") or ()),
        )


@dataclass(frozen=True)
class ClusterSpec:
    """A cluster: a name, one or more nodes, an image table."""

    name: str = "tandem"
    """The cluster's name; one machine can hold several clusters of different names."""
    nodes: tuple[NodeSpec, ...] = field(default_factory=lambda: (NodeSpec("node-0"),))
    """The nodes; the first one also hosts the control plane."""
    images: tuple[ImageEntry, ...] = ()
    """The images that exist; any other name ends in ErrImagePull."""

    def __post_init__(self) -> None:
        _check_label("cluster name", self.name)
        names = [node.name for node in self.nodes]
        if not names:
            raise SpecError("nodes is empty: a cluster needs at least one")
        if len(names) > MAX_NODES:
            raise SpecError(f"nodes has {len(names)} entries: a cluster has at most {MAX_NODES}")
        if len(set(names)) != len(names):
            raise SpecError(f"two nodes have the same name among {', '.join(names)}: rename one")

    def to_json(self) -> str:
        """The whole specification as JSON."""
        return json.dumps(
            {
                "name": self.name,
                "nodes": [
                    {"name": n.name, "resources": dict(n.resources), "labels": dict(n.labels)}
                    for n in self.nodes
                ],
                "images": [image.to_table() for image in self.images],
            },
            indent=2,
        )

    @classmethod
    def from_json(cls, text: str) -> ClusterSpec:
        """The inverse of `to_json`."""
        data = json.loads(text)
        return cls(
            name=data["name"],
            nodes=tuple(NodeSpec(n["name"], n["resources"], n["labels"]) for n in data["nodes"]),
            images=tuple(ImageEntry.from_table(entry) for entry in data["images"]),
        )


def _check_label(what: str, name: str) -> None:
    if not _DNS_LABEL.fullmatch(name):
        raise SpecError(
            f"{what} {name!r} is not valid: use 1 to 40 lower-case letters, digits and hyphens, "
            "beginning and ending with a letter or a digit"
        )
