"""Forwards one request to one instance through aiohttp and streams the reply back, byte for byte.

It parses no body. Backpressure comes from the transports: the next piece is read only when the client has taken the
last one. A client that hangs up cancels the handler, which closes the upstream connection, which stops the instance's
work. Deadlines: connecting, the first byte, and silence between pieces.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping

import aiohttp
from aiohttp import hdrs, web
from multidict import CIMultiDict
from yarl import URL

from router.api.context import lost_by
from router.errors import RouterError
from router.http1.headers import UNBUFFERED, Headers, is_stream, reply_headers, upstream_headers
from router.llm_api.errors import Api, stream_error
from router.llm_api.limits import RequestLimits
from router.llm_api.stream_end import TAIL_BYTES
from router.observability.request_record import RequestRecord

Body = bytes | AsyncIterator[bytes]


async def read_body(request: web.BaseRequest, limits: RequestLimits) -> bytes:
    """The whole body.

    Raises:
        BodyTooLarge: it is longer than `server.max_body_bytes`.
    """
    pieces: list[bytes] = []
    body_bytes = 0
    if request.body_exists:
        async for piece in request.content.iter_any():
            body_bytes += len(piece)
            limits.check_body_size(body_bytes)
            pieces.append(piece)
    return b"".join(pieces)


async def open_upstream(
    session: aiohttp.ClientSession,
    request: web.BaseRequest,
    base_url: str,
    body: Body,
    limits: RequestLimits,
    raw_path: str | None = None,
) -> aiohttp.ClientResponse:
    """Connects, sends, and waits for the reply's head. `raw_path` replaces the request's own.

    Raises:
        InstanceLost: the connection could not be made (InstanceUnreachable), or ended before the head.
        WaitTimeout: no head within `stream.first_byte_timeout_seconds`.
    """
    url = base_url + (raw_path or request.raw_path)
    raw: Headers = [(bytes(k), bytes(v)) for k, v in request.raw_headers]
    headers = CIMultiDict((k.decode("latin-1"), v.decode("latin-1")) for k, v in upstream_headers(raw))
    headers = onward_headers(session, headers)
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
        raise limits.first_byte_timeout() from error
    except (aiohttp.ClientError, OSError) as error:
        raise lost_by(error, f"the instance could not be reached: {error}") from error


def onward_headers(session: aiohttp.ClientSession, headers: CIMultiDict[str]) -> CIMultiDict[str]:
    """`headers`, then the session's own: aiohttp itself drops a header of its session that the request has too."""
    return CIMultiDict([*headers.items(), *session.headers.items()])


async def relay(
    request: web.BaseRequest,
    upstream: aiohttp.ClientResponse,
    limits: RequestLimits,
    api: Api,
    record: RequestRecord,
    now: Callable[[], float],
    lost: Callable[[str], RouterError],
) -> web.StreamResponse:
    """Streams the reply to the client. After the first byte every failure ends the stream visibly.

    `lost` makes the error of a server that is gone from its description.
    """
    response = _response_head(upstream, {**record.response_headers(), **record.unrouted_headers(upstream.status)})
    await response.prepare(request)
    if request.method == hdrs.METH_HEAD:
        await response.write_eof()
        return response
    try:
        await _pump(upstream, response, limits, record, now, lost)
    except RouterError as error:
        await _end_visibly(request, response, api, error)
        return response
    await response.write_eof()
    return response


def _response_head(upstream: aiohttp.ClientResponse, added: Mapping[str, str]) -> web.StreamResponse:
    response = web.StreamResponse(status=upstream.status, reason=upstream.reason)
    raw: Headers = [(bytes(k), bytes(v)) for k, v in upstream.raw_headers]
    for key, value in reply_headers(raw):
        response.headers.add(key.decode("latin-1"), value.decode("latin-1"))
    if is_stream(raw):
        response.headers.add(*UNBUFFERED)
    for name, text in added.items():
        response.headers[name] = text
    return response


async def _pump(
    upstream: aiohttp.ClientResponse,
    response: web.StreamResponse,
    limits: RequestLimits,
    record: RequestRecord,
    now: Callable[[], float],
    lost: Callable[[str], RouterError],
) -> None:
    content = upstream.content
    while True:
        try:
            async with asyncio.timeout(limits.idle_timeout_seconds):
                piece = await content.readany()
        except TimeoutError as error:
            raise limits.idle_timeout() from error
        except (aiohttp.ClientError, OSError) as error:
            raise lost("the instance died during its reply") from error
        if not piece:
            return
        if record.first_byte_at is None:
            record.first_byte_at = now()
        record.bytes_out += len(piece)
        record.tail = piece[-TAIL_BYTES:] if len(piece) >= TAIL_BYTES else (record.tail + piece)[-TAIL_BYTES:]
        await response.write(piece)


async def _end_visibly(request: web.BaseRequest, response: web.StreamResponse, api: Api, error: RouterError) -> None:
    """Ends with an error in the protocol's own form where the framing allows one; otherwise cuts the connection."""
    if hdrs.CONTENT_LENGTH not in response.headers:
        await response.write(stream_error(api, response.headers.get(hdrs.CONTENT_TYPE, ""), error))
        await response.write_eof()
    elif request.transport is not None:
        request.transport.abort()
