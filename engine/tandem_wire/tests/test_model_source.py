"""From model URIs to files: paths, packages and a hub on loopback."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tandem_wire.disk_cache import build_once, default_cache_dir
from tandem_wire.model_source import (
    BadModelFileError,
    ModelDownloadError,
    ModelNotFoundError,
    ModelSourceError,
    UnknownSourceError,
    UnsupportedModelError,
    read_model_facts,
    resolve_model,
)

CONFIG = {
    "model_type": "llama",
    "vocab_size": 100,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
}


def write_model(directory: Path, **extra: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({**CONFIG, **extra}))
    return directory


def test_a_directory_is_taken_as_it_is(tmp_path: Path) -> None:
    write_model(tmp_path / "a model")
    found = resolve_model(f"file://{tmp_path}/a%20model", revision="r1")
    assert (found.path, found.format, found.revision) == (tmp_path / "a model", "Safetensors", "r1")


def test_a_directory_with_one_gguf_file_means_that_file(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    assert resolve_model(f"file://{tmp_path}").path == tmp_path / "a.gguf"
    assert resolve_model(f"file://{tmp_path}/a.gguf").format == "Gguf"
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelNotFoundError, match=r"2 GGUF models; name one of them.*a\.gguf"):
        resolve_model(f"file://{tmp_path}")


@pytest.mark.parametrize(
    ("uri", "error", "remedy"),
    [
        ("ftp://x/y", UnknownSourceError, "hf://ORG/NAME"),
        ("llama", UnknownSourceError, "hf://ORG/NAME"),
        ("package://", UnknownSourceError, "package://NAME"),
        ("hf://only-a-name", UnknownSourceError, "hf://ORG/NAME"),
        ("file:///nowhere/at/all", ModelNotFoundError, "volume is mounted"),
        ("package://no-such-package-here", ModelNotFoundError, "pip install no-such-package-here"),
        ("package://msgspec", ModelNotFoundError, "exactly one GGUF file"),
    ],
)
def test_a_bad_uri_is_refused_with_a_remedy(
    uri: str, error: type[ModelSourceError], remedy: str
) -> None:
    with pytest.raises(error) as caught:
        resolve_model(uri)
    assert remedy in caught.value.remedy
    assert caught.value.message in str(caught.value)


def test_an_empty_directory_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"neither config.json nor a .gguf"):
        resolve_model(f"file://{tmp_path}")


# --- facts ----------------------------------------------------------------------------------------


def test_end_tokens_come_from_both_configs(tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 2, 7]}')
    facts = read_model_facts(tmp_path)
    assert facts.eos_token_ids == (2, 5, 7)
    assert (facts.architecture, facts.vocab_size, facts.max_position) == ("llama", 100, 512)


def test_of_a_multimodal_model_the_text_part_counts(tmp_path: Path) -> None:
    text = {"model_type": "gemma3_text", "vocab_size": 7, "max_position_embeddings": 9}
    write_model(tmp_path, text_config=text)
    facts = read_model_facts(tmp_path)
    assert (facts.architecture, facts.vocab_size) == ("gemma3_text", 7)


@pytest.mark.parametrize("content", ["[]", "{", "{}", '{"model_type": "mamba"}'])
def test_a_damaged_config_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(BadModelFileError, match=r"config\.json"):
        read_model_facts(tmp_path)


def test_a_directory_without_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(BadModelFileError, match=r"no config\.json"):
        read_model_facts(tmp_path)


# --- packages -------------------------------------------------------------------------------------


def install(site: Path, name: str, files: dict[str, bytes], requires: list[str]) -> None:
    """A package as pip leaves it: files, METADATA, RECORD with checksums."""
    folder = site / f"{name.replace('-', '_')}-1.0.dist-info"
    folder.mkdir(parents=True)
    lines = [f"Requires-Dist: {required}" for required in requires]
    (folder / "METADATA").write_text("\n".join(["Name: " + name, "Version: 1.0", *lines, ""]))
    record = []
    for path, content in files.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_bytes(content)
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        record.append(f"{path},sha256={digest},{len(content)}")
    (folder / "RECORD").write_text("\n".join(record) + "\n")


def test_a_whole_file_of_a_package_is_used_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "tiny-gguf", {"tiny_gguf/tiny.gguf": b"GGUF"}, [])
    monkeypatch.syspath_prepend(str(tmp_path))
    found = resolve_model("package://tiny-gguf", cache_dir=tmp_path / "cache")
    assert found.path == tmp_path / "tiny_gguf/tiny.gguf"


def test_parts_of_several_packages_are_joined_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, cache = tmp_path / "site", tmp_path / "cache"
    install(site, "big-gguf", {"big/__init__.py": b""}, ["big-gguf-b >=1", "big-gguf-a==1.0"])
    install(site, "big-gguf-a", {"a/big.gguf.part00": b"GG", "a/big.gguf.part01": b"UF"}, [])
    install(site, "big-gguf-b", {"b/big.gguf.part02": b"last"}, [])
    monkeypatch.syspath_prepend(str(site))
    seen: list[float] = []
    found = resolve_model("package://big-gguf", cache_dir=cache, progress=seen.append)
    assert found.path.read_bytes() == b"GGUFlast"
    assert found.path.is_relative_to(cache)
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    seen.clear()
    assert resolve_model("package://big-gguf", cache_dir=cache, progress=seen.append) == found
    assert seen == []


def test_a_damaged_or_missing_part_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "bad-gguf", {"bad/x.gguf.part00": b"GG", "bad/x.gguf.part01": b"UF"}, [])
    install(tmp_path, "gap-gguf", {"gap/x.gguf.part00": b"GG", "gap/x.gguf.part02": b"UF"}, [])
    install(tmp_path, "need-gguf", {"need.py": b""}, ["absent-gguf-part"])
    (tmp_path / "bad/x.gguf.part01").write_bytes(b"??")
    monkeypatch.syspath_prepend(str(tmp_path))
    cache = tmp_path / "cache"
    with pytest.raises(BadModelFileError, match="checksum"):
        resolve_model("package://bad-gguf", cache_dir=cache)
    assert not list(cache.rglob("*.gguf"))
    with pytest.raises(BadModelFileError, match=r"\[0, 2\]: some are missing"):
        resolve_model("package://gap-gguf", cache_dir=cache)
    with pytest.raises(ModelNotFoundError, match="absent-gguf-part"):
        resolve_model("package://need-gguf", cache_dir=cache)


# --- the cache ------------------------------------------------------------------------------------


def test_one_builder_builds_and_the_others_wait(tmp_path: Path) -> None:
    builds: list[Path] = []

    def build(path: Path) -> None:
        builds.append(path)
        assert path.parent != tmp_path
        path.write_text("made")

    target = tmp_path / "file"
    threads = [threading.Thread(target=build_once, args=(target, build)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1
    assert target.read_text() == "made"


def test_a_failed_build_leaves_nothing_and_can_be_repeated(tmp_path: Path) -> None:
    target = tmp_path / "file"

    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        build_once(target, fail)
    assert not target.exists()
    (tmp_path / ".file.build-killed").mkdir()  # what a killed process would leave
    build_once(target, lambda path: path.mkdir())
    assert target.is_dir()
    assert [path.name for path in tmp_path.glob(".file.build-*")] == []


def test_the_cache_directory_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_CACHE_DIR", "/some/where")
    assert default_cache_dir() == Path("/some/where")
    monkeypatch.delenv("TANDEM_CACHE_DIR")
    assert default_cache_dir() == Path.home() / ".cache" / "tandem"


# --- the hub --------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HUB_FILES = {
    "config.json": json.dumps(CONFIG).encode(),
    "tokenizer.json": b"{}",
    "model.safetensors": b"weights" * 1000,
    "model-q4.gguf": b"GGUF" + b"x" * 5000,
    "pytorch_model.bin": b"never wanted",
}


class _Hub(BaseHTTPRequestHandler):
    """The part of the hub's HTTP interface that a download uses, for one repository."""

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        if path.startswith("/api/models/org/tiny/tree/"):
            content = [
                {"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                for n, c in HUB_FILES.items()
            ]
            return self._send(200, json.dumps(content).encode(), body)
        if path.startswith("/api/models/org/tiny") and "missing" not in path:
            siblings = [{"rfilename": name} for name in HUB_FILES]
            info = {"id": "org/tiny", "sha": COMMIT, "siblings": siblings}
            return self._send(200, json.dumps(info).encode(), body)
        if path.startswith("/api/models/org/tiny"):
            return self._send(404, b"", body, error="RevisionNotFound")
        name = path.rpartition("/")[2]
        if path.startswith("/org/tiny/resolve/") and name in HUB_FILES:
            return self._send(200, HUB_FILES[name], body)
        if path.startswith("/org/tiny/resolve/"):
            return self._send(404, b"", body, error="EntryNotFound")
        if path.startswith(("/api/models/org/gated", "/org/gated")):
            return self._send(403, b"", body, error="GatedRepo")
        return self._send(404, b"", body, error="RepoNotFound")

    def _send(self, status: int, content: bytes, body: bool, error: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        address + "/{repo_id}/resolve/{revision}/{filename}",
    )
    yield address
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_repository_is_downloaded_with_progress(hub: str, tmp_path: Path) -> None:
    seen: list[float] = []
    found = resolve_model("hf://org/tiny", cache_dir=tmp_path, progress=seen.append)
    names = {path.name for path in found.path.iterdir()}
    assert names == {"config.json", "tokenizer.json", "model.safetensors"}
    assert found.revision == COMMIT
    assert found.format == "Safetensors"
    assert read_model_facts(found.path).vocab_size == 100
    assert seen
    assert seen[-1] == 1.0


def test_a_router_downloads_no_weights(hub: str, tmp_path: Path) -> None:
    found = resolve_model("hf://org/tiny@main", weights=False, cache_dir=tmp_path)
    assert {path.name for path in found.path.iterdir()} == {"config.json", "tokenizer.json"}


def test_one_gguf_file_of_a_repository(hub: str, tmp_path: Path) -> None:
    found = resolve_model("hf://org/tiny/model-q4.gguf", cache_dir=tmp_path)
    assert found.format == "Gguf"
    assert found.path.read_bytes() == HUB_FILES["model-q4.gguf"]


@pytest.mark.parametrize(
    ("uri", "error", "words"),
    [
        ("hf://org/nothing", ModelNotFoundError, "HF_TOKEN"),
        ("hf://org/tiny@missing", ModelNotFoundError, "revision missing"),
        ("hf://org/tiny/absent.gguf", ModelNotFoundError, "no absent.gguf"),
        ("hf://org/gated", ModelDownloadError, "accept its licence"),
    ],
)
def test_what_the_hub_refuses_becomes_a_typed_error(
    hub: str, uri: str, error: type[ModelSourceError], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        resolve_model(uri, cache_dir=tmp_path)


def test_an_unreachable_hub_is_said(
    hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(ModelDownloadError, match="check the network"):
        resolve_model("hf://org/tiny", cache_dir=tmp_path)


def test_the_error_tree_is_one_of_value_errors() -> None:
    for kind in (UnknownSourceError, ModelNotFoundError, BadModelFileError, UnsupportedModelError):
        assert issubclass(kind, ModelSourceError)
        assert issubclass(kind, ValueError)
