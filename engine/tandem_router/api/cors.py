"""Which web pages of other origins may call this router from a browser: none, unless configured."""

from collections.abc import Iterable
from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers

PREFLIGHT_SECONDS: Final = 600
EXPOSED: Final = (
    b"retry-after, x-request-id, x-tandem-decode-worker, x-tandem-prefill-worker, "
    b"x-tandem-kv-bytes, x-tandem-failovers"
)
RawHeaders = list[tuple[bytes, bytes]]


def parse_origins(origins: Iterable[str]) -> tuple[str, ...]:
    """Origins as browsers write them, or "*". Raises ValueError."""
    found: list[str] = []
    for given in origins:
        origin = given.lower()
        parts = urlsplit(origin)
        if origin != "*" and not (
            parts.scheme in ("http", "https")
            and parts.netloc
            and origin == f"{parts.scheme}://{parts.netloc}"
        ):
            raise ValueError(
                f"--cors-origin: {given!r} is not an origin; write https://HOST[:PORT] without a "
                "path, or * for all"
            )
        found.append(origin)
    return tuple(found)


def answer_headers(origins: tuple[str, ...], headers: Headers) -> RawHeaders:
    """What lets the page that asked read the answer; empty when it may not, or is no other's."""
    origin = headers.get("origin")
    if not origins or origin is None:
        return []
    if "*" in origins:
        allowed: RawHeaders = [(b"access-control-allow-origin", b"*")]
    elif origin.lower() in origins:
        allowed = [(b"access-control-allow-origin", origin.encode("latin-1")), (b"vary", b"origin")]
    else:
        return [(b"vary", b"origin")]
    return [*allowed, (b"access-control-expose-headers", EXPOSED)]


def is_preflight(method: str, headers: Headers) -> bool:
    """Whether a browser asks if it may ask."""
    return method == "OPTIONS" and "access-control-request-method" in headers


def preflight_headers(origins: tuple[str, ...], headers: Headers) -> RawHeaders:
    """The answer to a preflight: keys and SDKs' own headers may come along."""
    wanted = headers.get("access-control-request-headers", "")
    return [
        *answer_headers(origins, headers),
        (b"access-control-allow-methods", b"GET, POST"),
        (b"access-control-allow-headers", wanted.encode("latin-1", "replace")),
        (b"access-control-max-age", b"%d" % PREFLIGHT_SECONDS),
    ]
