"""The API keys: read from files and mounted secrets, and read again when these change."""

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from deadlines import patience

from tandem_router.api import keys as keys_module
from tandem_router.api.keys import ApiKeys, read_api_keys
from tandem_router.tests.fake_worker import FakeWorker, saying
from tandem_router.tests.harness import Running, router, until


def mount(folder: Path, version: str, **entries: str) -> None:
    """Write a secret's entries as the kubelet does: a new folder, then a swap of the link to it."""
    inner = folder / f"..{version}"
    inner.mkdir(parents=True)
    for name, text in entries.items():
        (inner / name).write_text(text)
    before = (folder / "..data").resolve() if (folder / "..data").is_symlink() else None
    (folder / "..data_tmp").symlink_to(inner.name)
    os.replace(folder / "..data_tmp", folder / "..data")
    for name in entries:
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(f"..data/{name}")
    for link in list(folder.iterdir()):
        if not link.name.startswith("..") and link.name not in entries:
            link.unlink()
    if before is not None:
        for entry in before.iterdir():
            entry.unlink()
        before.rmdir()


def test_keys_of_a_file_and_of_a_folder(tmp_path: Path) -> None:
    assert read_api_keys("") == frozenset()
    (tmp_path / "one").write_text("# comment\n alpha \n\nbeta\n")
    (tmp_path / "two").write_text("gamma")
    assert read_api_keys(str(tmp_path / "one")) == {"alpha", "beta"}
    assert read_api_keys(str(tmp_path)) == {"alpha", "beta", "gamma"}
    (tmp_path / "one").write_text("# none\n")
    with pytest.raises(ValueError, match="no key"):
        read_api_keys(str(tmp_path / "one"))
    (tmp_path / "one").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="UTF-8"):
        read_api_keys(str(tmp_path / "one"))


def test_keys_of_a_mounted_secret(tmp_path: Path) -> None:
    mount(tmp_path, "v1", first="a", second="b")
    assert read_api_keys(str(tmp_path)) == {"a", "b"}
    mount(tmp_path, "v2", second="c")
    assert read_api_keys(str(tmp_path)) == {"c"}
    (tmp_path / "..data").unlink()
    (tmp_path / "..data").symlink_to("..gone")
    with pytest.raises(OSError, match="gone"):
        read_api_keys(str(tmp_path))


@contextlib.asynccontextmanager
async def followed(path: Path) -> AsyncIterator[ApiKeys]:
    keys = ApiKeys(str(path))
    task = asyncio.create_task(keys.follow())
    try:
        yield keys
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.fixture(name="read_often")
def read_often_fixture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys_module, "POLL_SECONDS", 0.01)


@pytest.mark.usefixtures("read_often")
async def test_a_swapped_secret_is_followed(tmp_path: Path) -> None:
    mount(tmp_path, "v1", key="old")
    async with followed(tmp_path) as keys:
        mount(tmp_path, "v2", key="old", next="new")
        await until(lambda: keys.accept(b"new"))
        assert keys.accept(b"old")
        mount(tmp_path, "v3", next="new")
        await until(lambda: not keys.accept(b"old"))
        assert keys.accept(b"new")


@pytest.mark.usefixtures("read_often")
async def test_what_cannot_be_read_changes_nothing_and_no_key_opens_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "keys"
    path.write_text("s3cret")
    told: list[str] = []

    def says(words: str) -> bool:
        told.append(capsys.readouterr().out)
        return words in "".join(told)

    async with followed(path) as keys:
        path.rename(tmp_path / "away")
        await until(lambda: says("stay as they were"))
        assert keys.accept(b"s3cret")
        path.write_text("# none\n")
        await until(lambda: not keys.accept(b"s3cret"))
        assert says("every request is refused")
        assert keys.required, "an empty file doesn't open the router to all"
        assert not keys.accept(b"")
        path.write_text("n3w")
        await until(lambda: keys.accept(b"n3w"))
        assert says("the API keys have changed")
    assert "s3cret" not in "".join(told)
    assert "n3w" not in "".join(told)


@pytest.mark.usefixtures("read_often")
async def test_a_rotated_key_while_requests_run() -> None:
    """Old and new together, then the new one alone: nobody who holds a valid key is refused."""
    async with router(FakeWorker(script=saying("ok")), api_keys=("old",)) as running:
        accept = running.context.keys.accept
        used = ["old"]
        asked: list[tuple[str, int]] = []
        done = asyncio.Event()

        async def client() -> None:
            while not done.is_set():
                key = used[-1]
                asked.append((key, await ask(running, key)))

        clients = [asyncio.create_task(client()) for _ in range(3)]
        assert await ask(running, "new") == 401
        running.keys_file.write_text("old\nnew")
        await until(lambda: accept(b"new"))
        used.append("new")
        before = len(asked)
        # By then every client has ended its last request with the old key.
        await until(lambda: sum(key == "new" for key, _ in asked[before:]) >= 6)
        running.keys_file.write_text("new")
        await until(lambda: not accept(b"old"))
        assert (await ask(running, "old"), await ask(running, "new")) == (401, 200)
        done.set()
        await asyncio.wait_for(asyncio.gather(*clients), patience(30))
        assert {status for _, status in asked} == {200}


async def test_a_key_may_be_any_text() -> None:
    async with router(FakeWorker(script=saying("ok")), api_keys=("sésame",)) as running:
        assert await ask(running, "sésame") == 200
        assert await ask(running, "sesame") == 401


async def ask(running: Running, key: str) -> int:
    headers = {b"authorization": f"Bearer {key}".encode()}
    body = {"model": "mock", "prompt": "hi", "max_tokens": 2}
    answer = await running.http.post("/v1/completions", json=body, headers=headers)
    return answer.status_code


async def test_no_key_is_shown_or_logged(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, logger="tandem"):
        async with router(FakeWorker(script=saying("ok")), api_keys=("k-secret-1",)) as running:
            assert await ask(running, "k-secret-1") == 200
            assert await ask(running, "k-guess-2") == 401
            for path in ("/state", "/metrics"):
                assert "k-secret-1" not in (await running.monitor.get(path)).text
            assert "k-secret-1" not in repr(running.context.config)
    captured = capsys.readouterr()
    told = captured.out + captured.err + caplog.text
    assert "/v1/completions" in told, "the access log is there"
    assert "k-secret-1" not in told
    assert "k-guess-2" not in told
