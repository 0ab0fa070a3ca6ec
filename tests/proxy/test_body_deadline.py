"""A body must keep coming, at a least rate, and be whole after a while; heads likewise, and no length is absurd."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from router.http1.parser import LENGTH_MAX
from router.proxy.body_deadline import BodyDeadline
from tests.proxy.stage import LIMITS, rests, staged
from tests.support.rawhttp import connect
from tests.support.waiting import eventually

_LIMITS = replace(LIMITS, body_timeout_seconds=60.0, body_total_timeout_seconds=3600.0, body_bytes_per_second_min=500.0)
_HEAD = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"


def test_a_silent_sender_has_the_silence_timeout() -> None:
    deadline = BodyDeadline(_LIMITS, 100.0)
    assert deadline.due == 160.0
    deadline.received(1_000_000, 110.0)
    assert deadline.due == 170.0


def test_a_trickling_sender_has_what_its_bytes_allow_at_the_least_rate() -> None:
    deadline = BodyDeadline(_LIMITS, 100.0)
    for second in range(59):
        deadline.received(1, 100.0 + second)
    assert deadline.due == pytest.approx(160.0 + 59 / 500)
    deadline.received(5_000, 159.0)
    assert deadline.due == pytest.approx(160.0 + 59 / 500 + 10.0)


def test_a_steady_sender_has_the_total_timeout_unless_its_body_is_streamed() -> None:
    bounded, upload = BodyDeadline(_LIMITS, 0.0), BodyDeadline(_LIMITS, 0.0, is_bounded=False)
    for now in range(0, 3600, 30):
        bounded.received(1_000_000, float(now))
        upload.received(1_000_000, float(now))
    assert (bounded.due, upload.due) == (3600.0, 3630.0)


def test_time_in_which_the_router_does_not_read_is_no_fault_of_the_sender() -> None:
    deadline = BodyDeadline(_LIMITS, 0.0)
    deadline.received(1000, 1.0)
    for now in range(2, 3000):
        deadline.not_read(float(now))
    deadline.received(1, 3000.0)
    assert deadline.due == pytest.approx(2999.0 + 60.0 + 1 / 500)


@pytest.mark.parametrize("path", [b"/api/generate", b"/api/show", b"/api/blobs/sha256:1"])
async def test_a_body_that_trickles_is_cut_off(path: bytes) -> None:
    async with staged(limits=_LIMITS) as stage, connect(stage.address) as connection:
        now = [1000.0]
        stage.controller.clock = lambda: now[0]
        await connection.send(_HEAD % (path, 100_000))

        async def trickle() -> None:
            while True:
                now[0] += 5.0
                await connection.write(b"x")
                for _ in range(5):
                    await asyncio.sleep(0)

        trickling = asyncio.ensure_future(trickle())
        if path == b"/api/generate":
            assert (await connection.reply()).status == 408
        else:
            assert await connection.at_eof()
        trickling.cancel()
        await asyncio.gather(trickling, return_exceptions=True)
        await rests(stage)


async def test_a_head_that_trickles_is_cut_off() -> None:
    async with staged() as stage, connect(stage.address) as connection:
        now = [1000.0]
        stage.controller.clock = lambda: now[0]
        await connection.send(b"POST /api/generate HTTP/1.1\r\nHost: localhost\r\n")
        reply = asyncio.ensure_future(connection.reply())
        while not reply.done():
            now[0] += LIMITS.head_timeout_seconds / 100
            await connection.write(b"x")
            await asyncio.sleep(0)
        assert (await reply).status == 408


@pytest.mark.parametrize(
    "path", [b"/api/generate", b"/v1/chat/completions", b"/api/show", b"/api/blobs/sha256:1", b"/"]
)
@pytest.mark.parametrize("length", [LENGTH_MAX + 1, 2**64 - 1, 2**64, 10**30])
async def test_a_length_of_two_to_the_63_is_a_bad_request_on_every_route(path: bytes, length: int) -> None:
    async with staged() as stage, connect(stage.address) as connection:
        await connection.send(_HEAD % (path, length))
        assert (await connection.reply()).status == 400
        assert stage.handed == []
        await eventually(lambda: stage.is_at_rest, what="rest")
