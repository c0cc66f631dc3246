"""The API keys that clients may use, read again whenever their file changes."""

import asyncio
import hashlib
import hmac
from pathlib import Path
from typing import Final

import structlog

POLL_SECONDS: Final = 1.0

log = structlog.get_logger(__name__)


class ApiKeys:
    """The keys of --api-keys-file; without a file no key is needed.

    A key that is taken out of the file is refused from then on, one that is added is accepted; the
    requests that are under way stay. With no key left in the file every request is refused. What
    can't be read changes nothing: it is read again a moment later.
    """

    def __init__(self, path: str) -> None:
        """Raises OSError, and ValueError when the file has no key."""
        self._path = path
        self._digests = _digests(read_api_keys(path))

    @property
    def required(self) -> bool:
        """Whether a request needs a key."""
        return bool(self._path)

    def accept(self, key: bytes) -> bool:
        """Whether this is one of the keys. The time it takes tells nothing about them."""
        given = hashlib.sha256(key).digest()
        matches = [hmac.compare_digest(given, known) for known in self._digests]
        return any(matches)

    async def follow(self) -> None:
        """Read the file again and again, without end."""
        problem = ""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            try:
                keys: frozenset[str] | None = await asyncio.to_thread(read_api_keys, self._path)
                said = ""
            except OSError as error:
                keys = None
                said = f"the API keys stay as they were: {error}"
            except ValueError as error:
                said = f"every request is refused: {error}"
                # Someone may be writing the file: it counts if it is still so a moment later.
                keys = frozenset() if said == problem else None
            if said != problem:
                problem = said
                if said:
                    log.error("API keys", problem=said)
            if keys is not None and (digests := _digests(keys)) != self._digests:
                self._digests = digests
                log.info("the API keys have changed", num_keys=len(digests))


def _digests(keys: frozenset[str]) -> frozenset[bytes]:
    """What is kept of the keys: all of one length, and useless to whoever reads the memory."""
    return frozenset(hashlib.sha256(key.encode()).digest() for key in keys)


def read_api_keys(path: str) -> frozenset[str]:
    """The keys of --api-keys-file: a file with one key per line, or a folder of such files.

    A mounted secret is a folder with a file per entry. Raises OSError, and ValueError for no key.
    """
    if not path:
        return frozenset()
    place = Path(path)
    files = [place]
    if place.is_dir():
        # The kubelet swaps a whole folder through this link: all files must be of the same one.
        data = place / "..data"
        folder = data.resolve(strict=True) if data.is_symlink() else place
        files = [entry for entry in sorted(folder.iterdir()) if entry.is_file()]
    try:
        lines = [line.strip() for file in files for line in file.read_text().splitlines()]
    except UnicodeDecodeError:
        raise ValueError(f"--api-keys-file: {path} is not UTF-8 text: write text") from None
    keys = frozenset(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise ValueError(f"--api-keys-file: {path} contains no key: write one per line")
    return keys
