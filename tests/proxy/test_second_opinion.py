"""Real nginx as the second opinion on what is a valid request, and on where it ends.

Whatever the relay takes, nginx takes too, and both see the same requests in the same bytes: where two readers differ,
one request can be smuggled inside another. What the relay refuses, nginx may take: it is the stricter of the two.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
from collections.abc import Generator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.proxy.stage import staged
from tests.support.ollama_server import free_port
from tests.support.rawhttp import Address
from tests.support.waiting import eventually_sync

_SENTINEL = b"GET /sentinel HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
_BODY = b'{"model":"tiny"}'


@pytest.fixture(scope="module")
def nginx(tmp_path_factory: pytest.TempPathFactory) -> Generator[Address]:
    """An nginx that reads every request whole and answers it itself."""
    binary = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if binary is None:
        words = "nginx is not installed (make nginx)"
        pytest.fail(words) if os.environ.get("CI") else pytest.skip(words)
    folder, port = tmp_path_factory.mktemp("nginx"), free_port()
    temporary = " ".join(
        f"{name}_temp_path {folder}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config = folder / "nginx.conf"
    config.write_text(
        f"daemon off; pid {folder}/pid; error_log {folder}/error.log; worker_processes 1; events {{}}\n"
        f"http {{ access_log off; {temporary} lingering_close off; large_client_header_buffers 4 32k;\n"
        f'server {{ listen 127.0.0.1:{port}; location / {{ return 200 "$request_method $uri"; }} }} }}\n'
    )
    process = subprocess.Popen([binary, "-c", str(config), "-p", str(folder)], stderr=subprocess.DEVNULL)
    try:
        eventually_sync((folder / "pid").exists, what="nginx")
        yield Address("127.0.0.1", port)
    finally:
        process.terminate()
        process.wait(10)


async def _answers(address: Address, raw: bytes) -> list[int]:
    """The statuses that come back for these bytes, until the other side closes."""
    reader, writer = await asyncio.open_connection(address.host, address.port)
    with contextlib.suppress(ConnectionError):
        writer.write(raw)
        writer.write_eof() if writer.can_write_eof() and b"HTTP/1.0" in raw else None
        await writer.drain()
    out = b""
    with contextlib.suppress(ConnectionError, TimeoutError):
        async with asyncio.timeout(5.0):
            while data := await reader.read(65536):
                out += data
    writer.close()
    return [int(part[:3]) for part in out.split(b"HTTP/1.1 ")[1:]]


_HOSTS = st.sampled_from(
    (
        *(
            b"Host: localhost",
            b"Host:localhost",
            b"hOST:  localhost ",
            b"",
        ),
        *(
            b"Host: localhost\r\nHost: localhost",
            b"Host : localhost",
        ),
    )
)
_FRAMINGS = st.sampled_from(
    (
        *(b"Content-Length: 16", b"Content-Length: 16", b"Transfer-Encoding: chunked"),
        *(
            b"Content-Length: 16",
            b"content-length:16",
            b"Content-Length: 16 ",
            b"Content-Length: 016",
        ),
        *(
            b"Content-Length: +16",
            b"Content-Length: 1_6",
            b"Content-Length: 0x10",
        ),
        *(
            b"Content-Length: 16,16",
            b"Content-Length: 16\r\nContent-Length: 16",
        ),
        *(
            b"Content-Length: 16\r\nContent-Length: 0",
            b"Content-Length:",
            b"Content-Length : 16",
        ),
        *(
            b" Content-Length: 16",
            b"Content-Length: 16\r\n ",
            b"Content_Length: 16",
            b"",
        ),
        *(
            b"Transfer-Encoding: chunked",
            b"transfer-encoding:chunked",
            b"Transfer-Encoding: Chunked ",
        ),
        *(
            b"Transfer-Encoding: xchunked",
            b"Transfer-Encoding: chunked, identity",
        ),
        *(
            b"Transfer-Encoding: identity",
            b"Transfer-Encoding: gzip, chunked",
        ),
        *(b"Transfer-Encoding: chunked\r\nContent-Length: 16",),
        *(
            b"Content-Length: 16\r\nTransfer-Encoding: chunked",
            b"Transfer-Encoding : chunked",
        ),
        *(
            b"Transfer-Encoding:\x0bchunked",
            b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
        ),
        *(
            b'Transfer-Encoding: "chunked"',
            b"TE: chunked",
        ),
    )
)
_MORE = st.lists(
    st.sampled_from(
        (
            *(
                b"X: y",
                b"X:",
                b"X: \xe4",
                b"X: a\tb",
                b"X_Y: z",
                b"X",
                b": y",
                b"X: a\r\n b",
                b"X: \x00",
            ),
            *(
                b"X: a\rb",
                b"Accept: */*",
            ),
        )
    ),
    max_size=2,
)
_CHUNKS = st.sampled_from(
    (
        b"10\r\n" + _BODY + b"\r\n0\r\n\r\n",
        b"8;a=b\r\n" + _BODY[:8] + b"\r\n8\r\n" + _BODY[8:] + b"\r\n000\r\nX: y\r\n\r\n",
        b"10\n" + _BODY + b"\n0\n\n",
        b"10 \r\n" + _BODY + b"\r\n0\r\n\r\n",
        b" 10\r\n" + _BODY + b"\r\n0\r\n\r\n",
        b"0x10\r\n" + _BODY + b"\r\n0\r\n\r\n",
        b"10\r\n" + _BODY + b"XX0\r\n\r\n",
        b"10\r\n" + _BODY + b"\r\n0\r\nX\r\n\r\n",
        b"-1\r\n\r\n0\r\n\r\n",
        b"fffffffffffffffff\r\n",
        b"10\r\r\n" + _BODY + b"\r\n0\r\n\r\n",
        b"0\r\n\r\n",
        _BODY,
        b"",
    )
)
_LINES = st.sampled_from(
    (
        *(
            b"POST /api/generate HTTP/1.1",
            b"POST /api/generate HTTP/1.1",
            b"POST /api/generate HTTP/1.1",
        ),
        *(
            b"POST /api/generate HTTP/1.1",
            b"GET /api/tags HTTP/1.1",
            b"POST  /api/generate HTTP/1.1",
        ),
        *(
            b"POST /api/generate  HTTP/1.1",
            b"POST /api/generate HTTP/1.1 ",
        ),
        *(
            b"POST /api/generate HTTP/1.0",
            b"POST /api/generate http/1.1",
            b"POST /api/generate HTTP/2.0",
        ),
        *(
            b"POST /api/generate",
            b"post /api/generate HTTP/1.1",
        ),
        *(
            b"POST http://localhost/api/generate HTTP/1.1",
            b"\r\nPOST /api/generate HTTP/1.1",
        ),
        *(b"POST /api/gen erate HTTP/1.1",),
    )
)


@st.composite
def _requests(draw: st.DrawFn) -> bytes:
    """One request, ordinary or odd, and behind it one that is certainly good."""
    host = draw(st.just(b"Host: localhost") | _HOSTS)
    fields = [host, draw(_FRAMINGS), *draw(_MORE)]
    head = b"\r\n".join((draw(_LINES), *(f for f in draw(st.permutations(fields)) if f), b"", b""))
    body = draw(_CHUNKS) if b"hunked" in head else draw(st.just(_BODY) | _CHUNKS)
    return head + body + _SENTINEL


@given(raw=_requests())
@settings(max_examples=400, deadline=None)
def test_what_the_relay_takes_nginx_takes_and_sees_the_same_requests_in(nginx: Address, raw: bytes) -> None:
    async def check() -> None:
        async with staged() as stage:
            ours = await _answers(stage.address, raw)
            sentinels = stage.handed.count("/sentinel")
        if not ours or ours[0] >= 400:
            return
        theirs = await _answers(nginx, raw)
        taken = [status for status in theirs if status < 400]
        assert len([status for status in ours if status < 400]) == len(taken), (raw, ours, theirs)
        assert sentinels == len(taken) - 1, (raw, ours, theirs)

    asyncio.run(check())


def test_the_second_opinion_is_asked_about_requests_that_are_taken(nginx: Address) -> None:
    """The property above says nothing where everything is refused."""

    async def check() -> None:
        plain = b"POST /api/generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 16\r\n\r\n" + _BODY + _SENTINEL
        async with staged() as stage:
            assert await _answers(stage.address, plain) == [200, 200]
            assert await _answers(nginx, plain) == [200, 200]

    asyncio.run(check())
