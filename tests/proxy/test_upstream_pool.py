"""A server's connection by itself: it passes tokens on where it may, and is closed when it has been idle for long."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from router.proxy.upstream_pool import IDLE_SECONDS, ONE_CHUNK, Pool, UpstreamConnection

URL = "http://127.0.0.1:1"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


TOKEN = chunk(b'{"model":"m","response":"so","done":false}\n')
LAST = chunk(b'{"model":"m","response":"","done":true,"eval_count":3}\n')


class _Transport:
    def __init__(self) -> None:
        self.aborted = False

    def abort(self) -> None:
        self.aborted = True

    def is_closing(self) -> bool:
        return self.aborted


class _Receiver:
    def __init__(self) -> None:
        self.got: list[bytes] = []

    def reply_bytes(self, data: bytes) -> None:
        self.got.append(data)

    def reply_ended(self, error: Exception | None) -> None:
        raise AssertionError(f"nothing ends here: {error}")

    def upstream_full(self) -> None: ...

    def upstream_drained(self) -> None: ...


class _Clock:
    seconds = 0.0

    def now(self) -> float:
        return self.seconds


def connection_of(pool: Pool) -> UpstreamConnection:
    connection = UpstreamConnection(pool, URL)
    connection.connection_made(cast("asyncio.BaseTransport", _Transport()))
    return connection


def test_tokens_pass_by_the_receiver_who_said_so_and_everything_else_reaches_him() -> None:
    connection, receiver, sent = connection_of(Pool(1.0, _Clock().now)), _Receiver(), list[bytes]()
    connection.receiver = receiver
    connection.data_received(TOKEN)
    connection.pass_tokens(sent.append)
    connection.data_received(TOKEN)
    connection.data_received(TOKEN)
    connection.data_received(LAST)
    assert (receiver.got, sent) == ([TOKEN, LAST], [TOKEN, TOKEN])
    assert connection.stop_passing() == 2 * (ONE_CHUNK + len(TOKEN))
    connection.data_received(TOKEN)
    assert (receiver.got, sent) == ([TOKEN, LAST, TOKEN], [TOKEN, TOKEN])
    assert connection.stop_passing() == 0


@pytest.mark.parametrize(
    "piece",
    [
        TOKEN[:-1],
        TOKEN + TOKEN,
        b"0" + TOKEN,
        TOKEN.replace(b"2b", b"2c"),
        TOKEN.replace(b"\r\n", b"\n\r", 1),
        TOKEN.upper(),
        chunk(b"done"),
        b"",
    ],
)
def test_what_is_not_exactly_one_whole_token_is_looked_at(piece: bytes) -> None:
    connection, receiver, sent = connection_of(Pool(1.0, _Clock().now)), _Receiver(), list[bytes]()
    connection.receiver = receiver
    connection.pass_tokens(sent.append)
    connection.data_received(piece)
    assert (receiver.got, sent) == ([piece], [])


def test_what_was_idle_for_long_is_closed_the_oldest_first() -> None:
    clock = _Clock()
    pool = Pool(1.0, clock.now)
    old, young = connection_of(pool), connection_of(pool)
    pool.release(old)
    clock.seconds = IDLE_SECONDS
    pool.release(young)
    assert pool.sweep(clock.seconds) == 0
    assert pool.sweep(clock.seconds + 0.1) == 1
    assert (old.transport.is_closing(), young.transport.is_closing()) == (True, False)
    assert pool.take(URL) is young
    assert pool.take(URL) is None
