"""A request's body: read whole, decoded, and bounded in bytes and time."""

import asyncio
import zlib
from typing import Final

from starlette.datastructures import Headers
from starlette.types import Receive

from tandem_router.config import RouterConfig
from tandem_router.dispatch.stream import ClientGone
from tandem_router.errors import BodyTooLarge, InvalidRequest, RequestTimeout, UnsupportedEncoding

GZIP: Final = zlib.MAX_WBITS | 16
DEFLATE: Final = zlib.MAX_WBITS
RAW_DEFLATE: Final = -zlib.MAX_WBITS
MAX_MEMBERS: Final = 16
WINDOWS: Final = {"gzip": GZIP, "x-gzip": GZIP, "deflate": DEFLATE}
ACCEPTED: Final = "gzip, deflate, identity"


async def read_body(receive: Receive, headers: Headers, config: RouterConfig) -> bytes:
    """The whole body, decoded.

    Raises BodyTooLarge, RequestTimeout, UnsupportedEncoding, InvalidRequest for a body that isn't
    what its Content-Encoding says, and ClientGone when the client left meanwhile.
    """
    coding = headers.get("content-encoding", "").strip().lower()
    if coding not in ("", "identity", *WINDOWS):
        raise UnsupportedEncoding(
            f"Content-Encoding {coding!r} is not supported: use one of {ACCEPTED}",
        )
    try:
        async with asyncio.timeout(config.body_seconds):
            body = await _read(receive, config.max_body_bytes)
    except TimeoutError as error:
        raise RequestTimeout(
            f"the request's body took longer than {config.body_seconds:g} seconds"
        ) from error
    if coding in WINDOWS and body:
        # In a thread: a small body may become a large one, and streams go on meanwhile.
        return await asyncio.to_thread(decompress, body, coding, config.max_body_bytes)
    return body


async def _read(receive: Receive, limit: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise BodyTooLarge(f"the request body is longer than {limit} bytes")
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


def decompress(body: bytes, coding: str, limit: int) -> bytes:
    """`body` decoded; never holds more than `limit` bytes of the result.

    Raises BodyTooLarge, and InvalidRequest for what isn't in this coding or is cut off.
    """
    window = WINDOWS[coding]
    # "deflate" means zlib's format; some clients send the bare stream, which can't start like it.
    if window == DEFLATE and not (body[0] & 0x0F == 8 and int.from_bytes(body[:2]) % 31 == 0):
        window = RAW_DEFLATE
    parts: list[bytes] = []
    left = limit
    try:
        while body:
            if len(parts) == MAX_MEMBERS:  # each costs a copy of the rest
                raise InvalidRequest(
                    f"the body has more than {MAX_MEMBERS} {coding} members: send one",
                    code="invalid_body",
                )
            decoder = zlib.decompressobj(window)
            part = decoder.decompress(body, left + 1)
            left -= len(part)
            if left < 0:
                raise BodyTooLarge(f"the decoded request body is longer than {limit} bytes")
            if not decoder.eof:
                raise InvalidRequest(
                    f"the body ends before its {coding} stream does", code="invalid_body"
                )
            parts.append(part)
            body = decoder.unused_data
    except zlib.error as error:
        raise InvalidRequest(
            f"the body is not in the {coding} coding that Content-Encoding names: {error}",
            code="invalid_body",
        ) from error
    return b"".join(parts)
