"""Sends one request on to one instance and streams its answer back, byte for byte.

It parses no body. Backpressure is the transport's in both directions: the next piece is read only when the client took
the last one. A client that hangs up cancels the handler, which closes the upstream connection, which stops the
generation. Deadlines: connecting, the first byte, and silence between pieces.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import aiohttp
import msgspec
from aiohttp import hdrs, web
from multidict import CIMultiDict
from yarl import URL

from router.api.context import Limits
from router.errors import InstanceLost, RouterError, WaitTimeout
from router.http1.headers import reply_headers, upstream_headers
from router.llm_api.errors import Api, stream_error
from router.llm_api.stream_end import TAIL_BYTES

Raw = list[tuple[bytes, bytes]]
Body = bytes | AsyncIterator[bytes]


class Exchange(msgspec.Struct):
    """What became of one forwarded request; filled in as it goes."""

    started: Callable[[], float]
    status: int = 0
    first_byte_at: float | None = None
    last_byte_at: float | None = None
    bytes_out: int = 0
    chunks: int = 0
    """HTTP chunks with data in them, where the reply came in chunks: of a stream, about its tokens."""
    tail: bytes = b""
    """The end of the reply, enough to read the final line's token counts from."""
    extra_headers: dict[str, str] = msgspec.field(default_factory=dict[str, str])


async def open_upstream(
    session: aiohttp.ClientSession,
    request: web.BaseRequest,
    base_url: str,
    body: Body,
    limits: Limits,
    raw_path: str | None = None,
) -> aiohttp.ClientResponse:
    """Connects, sends, and waits for the reply's head. `raw_path` takes the place of the request's own.

    Raises:
        InstanceLost: the connection could not be made or ended before the head.
        WaitTimeout: no head within `stream.first_byte_timeout_seconds`.
    """
    url = base_url + (raw_path or request.raw_path)
    raw: Raw = [(bytes(k), bytes(v)) for k, v in request.raw_headers]
    headers = CIMultiDict((k.decode("latin-1"), v.decode("latin-1")) for k, v in upstream_headers(raw))
    headers.popall(hdrs.CONTENT_LENGTH, None)
    headers.popall(hdrs.HOST, None)
    try:
        async with asyncio.timeout(limits.first_byte_timeout_seconds):
            return await session.request(
                request.method,
                URL(url, encoded=True),
                data=body or None,
                headers=headers,
                allow_redirects=False,
                skip_auto_headers=(hdrs.ACCEPT, hdrs.ACCEPT_ENCODING, hdrs.USER_AGENT, hdrs.CONTENT_TYPE),
            )
    except TimeoutError as error:
        seconds = limits.first_byte_timeout_seconds
        raise WaitTimeout(f"no answer within {seconds:.0f} s (stream.first_byte_timeout_seconds)") from error
    except (aiohttp.ClientError, OSError) as error:
        raise InstanceLost(f"the instance could not be reached: {error}") from error


async def relay(
    request: web.BaseRequest, upstream: aiohttp.ClientResponse, limits: Limits, api: Api, exchange: Exchange
) -> web.StreamResponse:
    """Streams the reply to the client. After the first byte every failure ends the stream visibly."""
    response = _reply_head(upstream, exchange)
    exchange.status = upstream.status
    await response.prepare(request)
    if request.method == hdrs.METH_HEAD:
        await response.write_eof()
        return response
    try:
        await _pump(upstream, response, limits, exchange)
    except RouterError as error:
        await _end_visibly(request, response, api, error)
        return response
    await response.write_eof()
    return response


def _reply_head(upstream: aiohttp.ClientResponse, exchange: Exchange) -> web.StreamResponse:
    response = web.StreamResponse(status=upstream.status, reason=upstream.reason)
    raw: Raw = [(bytes(k), bytes(v)) for k, v in upstream.raw_headers]
    for key, value in reply_headers(raw):
        response.headers.add(key.decode("latin-1"), value.decode("latin-1"))
    for name, text in exchange.extra_headers.items():
        response.headers[name] = text
    return response


async def _pump(
    upstream: aiohttp.ClientResponse, response: web.StreamResponse, limits: Limits, exchange: Exchange
) -> None:
    content = upstream.content
    while True:
        try:
            async with asyncio.timeout(limits.idle_timeout_seconds):
                piece = await content.readany()
        except TimeoutError as error:
            seconds = limits.idle_timeout_seconds
            raise WaitTimeout(f"the stream was silent for {seconds:.0f} s (stream.idle_timeout_seconds)") from error
        except (aiohttp.ClientError, OSError) as error:
            raise InstanceLost("the instance died while it answered") from error
        if not piece:
            return
        if exchange.first_byte_at is None:
            exchange.first_byte_at = exchange.started()
        exchange.bytes_out += len(piece)
        exchange.tail = piece[-TAIL_BYTES:] if len(piece) >= TAIL_BYTES else (exchange.tail + piece)[-TAIL_BYTES:]
        await response.write(piece)


async def _end_visibly(request: web.BaseRequest, response: web.StreamResponse, api: Api, error: RouterError) -> None:
    """An error line in the protocol's own form where the framing allows one; then the connection is closed."""
    if hdrs.CONTENT_LENGTH not in response.headers:
        await response.write(stream_error(api, response.headers.get(hdrs.CONTENT_TYPE, ""), error))
        await response.write_eof()
    elif request.transport is not None:
        request.transport.abort()
