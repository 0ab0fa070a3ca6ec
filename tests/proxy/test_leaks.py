"""Thousands of requests, broken off at random on either side: in the end nothing is left over.

`make leaks` plays a hundred thousand; `ABORTS` says how many otherwise.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
from collections import Counter
from pathlib import Path

import pytest

from tests.proxy.stage import Script, Stage, Turn, staged
from tests.support.rawhttp import Connection, connect, request_bytes
from tests.support.waiting import eventually

_REQUESTS = int(os.environ.get("ABORTS", "10000"))
_PARTS = 10
"""The stage forgets after each what it has seen, so that what grows is the relay's."""
_SIDE_BY_SIDE = 50
_ASK = request_bytes("POST", "/api/generate", {"model": "tiny", "prompt": "hi"})
_SETTINGS: dict[str, object] = {"keep_alive": "5m", "options": {"num_ctx": 8192}}
_PROMPT = {"prompt": "hi", "images": ["x" * 300_000]}
_LONG_ASKS = tuple(
    request_bytes("POST", "/api/generate", {"model": "tiny", **members})
    for members in (_PROMPT, {**_SETTINGS, **_PROMPT}, {**_PROMPT, **_SETTINGS})
)
"""Forwarded while they come, with settings at either end."""
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"
_LINE = b'f\r\n{"response":1}\n\r\n'
_ENDS = b'e\r\n{"done":true}\n\r\n0\r\n\r\n'
_FAILED = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 28\r\n\r\nprocess no longer running: x"


def _moody(dice: random.Random) -> Script:
    """A server that answers well, slowly, badly, half, or not at all."""

    async def script(turn: Turn) -> None:
        mood = dice.random()
        if mood < 0.05:
            turn.transport.close()
        elif mood < 0.1:
            await turn.write(_FAILED)
        elif mood < 0.15:
            await turn.write(_HEAD, _LINE[: dice.randrange(1, len(_LINE))])
            turn.transport.abort() if dice.random() < 0.5 else turn.transport.close()
        elif mood < 0.18:
            await turn.write(b"HTTP/1.1 200 nonsense\r\nContent-Length: x\r\n\r\n")
        elif mood < 0.25:
            await asyncio.Event().wait()
        else:
            await turn.write(_HEAD, *[_LINE] * dice.randrange(4), _ENDS)

    return script


async def _leave(connection: Connection, dice: random.Random) -> None:
    connection.half_close() if dice.random() < 0.3 else connection.abort()


async def _client(stage: Stage, dice: random.Random, count: int) -> None:
    """Some requests, one connection after the other, each left at a moment of its own."""
    while count > 0:
        async with connect(stage.address, 30.0) as connection:
            with contextlib.suppress(EOFError, OSError):
                for _ in range(dice.randrange(1, 4)):
                    count -= 1
                    await _one(connection, dice)


async def _one(connection: Connection, dice: random.Random) -> None:
    raw = _ASK if dice.random() < 0.9 else request_bytes("GET", "/chunked")
    if dice.random() < 0.05:
        raw = dice.choice(_LONG_ASKS)
    if dice.random() < 0.1:
        await connection.send(raw[: dice.randrange(len(raw))])
        await _leave(connection, dice)
        raise EOFError
    await connection.send(raw * dice.randrange(1, 3) if dice.random() < 0.1 else raw)
    for _ in range(dice.randrange(8)):
        await asyncio.sleep(0)
    if dice.random() < 0.4:
        await _leave(connection, dice)
        raise EOFError
    async with asyncio.timeout(0.2):
        await connection.reply()


async def _play(stage: Stage, dice: random.Random, count: int) -> None:
    async def client() -> None:
        share = count // _SIDE_BY_SIDE
        while share > 0:
            part = min(share, 20)
            with contextlib.suppress(TimeoutError):
                await _client(stage, dice, part)
            share -= part

    await asyncio.gather(*(client() for _ in range(_SIDE_BY_SIDE)))
    await eventually(lambda: stage.is_at_rest and stage.proxy.connection_count == 0, what="rest")


def _forget(stage: Stage) -> None:
    """What the stage itself remembers is no leak."""
    upstream, controller = stage.upstream, stage.controller
    for remembered in (
        upstream.transports,
        upstream.turns,
        controller.tickets,
        controller.lost,
        stage.request_log.entries,
        stage.handed,
    ):
        remembered.clear()


def _open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def _resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def _told(stage: Stage, objects: int) -> str:
    """What is there at rest, for the long run's reader."""
    return (
        f"slots held {len(stage.controller.held)}, waiting {len(stage.controller.waiting)}, "
        f"running {stage.request_log.running}, clients' connections {stage.proxy.connection_count}, "
        f"servers' {stage.upstream.open} (idle in the pool {stage.pool.idle_count}), files {_open_files()}, "
        f"objects {objects}, resident {_resident_mb():.1f} MB"
    )


@pytest.mark.asyncio(loop_factories=["uvloop"])
async def test_nothing_is_left_over_after_thousands_of_broken_requests(capsys: pytest.CaptureFixture[str]) -> None:
    dice = random.Random(1)
    async with staged() as stage:
        stage.upstream.script = _moody(dice)
        part = _REQUESTS // _PARTS
        await _play(stage, dice, part)
        _forget(stage)
        gc.collect()
        objects, idle = len(gc.get_objects()), stage.pool.idle_count
        files = _open_files() - 2 * idle
        lines = [f"after {part} requests: {_told(stage, objects)}"]
        statuses = Counter[int]()
        for number in range(1, _PARTS + 1):
            await _play(stage, dice, part)
            statuses.update(stage.request_log.statuses)
            _forget(stage)
            gc.collect()
            left = len(gc.get_objects())
            lines.append(f"after {number * part} more: {_told(stage, left)}")
        assert statuses.total() > _REQUESTS // 3
        assert {200, 499, 502} <= set(statuses)
        await eventually(lambda: stage.upstream.open == stage.pool.idle_count, what="the servers' connections")
        gc.collect()
        await eventually(lambda: _open_files() - 2 * stage.pool.idle_count <= files, what="the files to be closed")
        if "ABORTS" in os.environ:
            with capsys.disabled():
                print("", *lines, f"answers by status: {sorted(statuses.items())}", sep="\n")
        kept_objects_each = 40  # an idle connection's own
        allowed = objects + kept_objects_each * max(0, stage.pool.idle_count - idle) + 500
        assert len(gc.get_objects()) < allowed
