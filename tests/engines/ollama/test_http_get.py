"""Requests over raw connections: kept, renewed, and closed whenever a reply is not whole."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from router.engines.ollama.http_get import KeptConnections, get_once, is_plain
from tests.support.scripted_server import failing, hanging, scripted
from tests.support.waiting import eventually


@dataclass
class Raw:
    """A server that answers each request with the next of `answers`, bytes and all."""

    answers: list[bytes]
    url: str = ""
    heads: list[bytes] = field(default_factory=list[bytes])
    connections: int = 0
    closed: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                self.heads.append(await reader.readuntil(b"\r\n\r\n"))
                answer = self.answers.pop(0)
                writer.write(answer)
                if b"\r\n\r\n" not in answer or b"Connection: close" in answer or answer.endswith(b"!"):
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.closed += 1
            writer.close()


@asynccontextmanager
async def raw(*answers: bytes) -> AsyncGenerator[tuple[Raw, KeptConnections]]:
    served, connections = Raw(list(answers)), KeptConnections()
    server = await asyncio.start_server(served.serve, "127.0.0.1", 0)
    async with server:
        served.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        yield served, connections
        connections.close()
        await eventually(lambda: served.closed == served.connections)


def sized(body: bytes, status: int = 200) -> bytes:
    return b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body)


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n3\r\ncde\r\n0\r\n\r\n"


async def test_one_connection_carries_one_request_after_another() -> None:
    async with raw(sized(b"one"), CHUNKED, sized(b"", 404)) as (server, kept):
        assert [await kept.get(server.url, path) for path in ("/a", "/b", "/c")] == [
            (200, b"one"), (200, b"abcde"), (404, b""),
        ]  # fmt: skip
        assert server.connections == 1
        assert server.heads[0].startswith(b"GET /a HTTP/1.1\r\nHost: 127.0.0.1:")


async def test_a_connection_that_the_server_closed_meanwhile_is_renewed() -> None:
    async with raw(sized(b"one"), b"", sized(b"two")) as (server, kept):
        assert await kept.get(server.url, "/") == (200, b"one")
        assert await kept.get(server.url, "/") == (200, b"two")  # the second request met a closing server
        assert server.connections == 2


async def test_a_new_connection_that_is_closed_without_a_reply_is_an_error() -> None:
    async with raw(b"") as (server, kept):
        with pytest.raises(ConnectionError):
            await kept.get(server.url, "/")
        assert server.connections == 1


@pytest.mark.parametrize(
    "answer",
    [b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nx!", b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Le",
     b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nz\r\n!"],
)  # fmt: skip
async def test_a_reply_that_is_cut_or_malformed_is_an_error(answer: bytes) -> None:
    async with raw(answer) as (server, kept):
        with pytest.raises(ConnectionError):
            await kept.get(server.url, "/")


@pytest.mark.parametrize(
    "answer",
    [b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 1\r\n\r\nx", b"HTTP/1.0 200 OK\r\n\r\nx!",
     sized(b"x") + b"more!"],
)  # fmt: skip
async def test_a_connection_is_not_kept_after_a_reply_that_ends_it(answer: bytes) -> None:
    async with raw(answer, sized(b"two")) as (server, kept):
        assert (await kept.get(server.url, "/"))[1].startswith(b"x")
        assert (await kept.get(server.url, "/"))[1] == b"two"
        assert server.connections == 2


async def test_calls_at_the_same_time_do_not_wait_for_each_other() -> None:
    async with scripted({"/slow": lambda _: hanging(), "/fast": {}}) as server:
        kept = KeptConnections()
        slow = asyncio.ensure_future(kept.get(server.url, "/slow"))
        await eventually(lambda: server.requests)
        assert await kept.get(server.url, "/fast") == (200, b"{}")
        slow.cancel()
        with pytest.raises(asyncio.CancelledError):
            await slow
        await eventually(lambda: server.hung_up == ["/slow"])
        kept.close()


async def test_once_means_a_connection_of_its_own() -> None:
    async with scripted({"/x": failing(503, b"no")}) as server:
        assert [await get_once(server.url, "/x") for _ in range(2)] == [(503, b"no")] * 2
        assert len({request.port for request in server.requests}) == 2


async def test_nothing_is_kept_after_the_end() -> None:
    async with raw(sized(b"one")) as (server, kept):
        kept.close()
        assert await kept.get(server.url, "/") == (200, b"one")
        await eventually(lambda: server.closed == 1)


@pytest.mark.parametrize(("url", "plain"), [
    ("http://127.0.0.1:1", True), ("http://[::1]:1", True), ("https://a:1", False), ("http://u:p@a:1", False),
])  # fmt: skip
def test_only_plain_http_is_asked_raw(url: str, plain: bool) -> None:
    assert is_plain(url) is plain
