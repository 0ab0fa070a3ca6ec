"""File descriptors that are used up, and a disk that is full: told, survived, and over when they are over."""

from __future__ import annotations

import contextlib
import resource
from pathlib import Path

import psutil
import pytest

from tests.emulated.test_operator_commands import _FAST, _QUICK_POLLS, _ask, _status
from tests.support.product import prepare, running
from tests.support.rawhttp import Connection, connect
from tests.support.waiting import eventually

pytestmark = pytest.mark.rig


async def test_without_file_descriptors_no_server_is_blamed_and_service_goes_on_afterwards(tmp_path: Path) -> None:
    with running(prepare(tmp_path, _QUICK_POLLS, _FAST, ("--rig", "2x3090"))) as product:
        assert (await _ask(product)).status == 200
        servers = {process.pid for process in product.servers().values()}
        assert product.process is not None
        pid = product.process.pid
        before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        async with contextlib.AsyncExitStack() as clients:
            idle: list[Connection] = [await clients.enter_async_context(connect(product.address)) for _ in range(4)]
            replies = [await connection.call("GET", "/health") for connection in idle]
            assert {reply.status for reply in replies} == {200}
            used = psutil.Process(pid).num_fds()
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (used, before[1]))
            body = {"model": "qwen3:8b", "prompt": "hello", "options": {"num_predict": 4}}
            reply = await idle[0].call("POST", "/api/generate", body)
            assert reply.status in (200, 502, 503), reply.body
            assert (await idle[1].call("GET", "/health")).status == 200
            await eventually(
                lambda: "instance_not_asked" in product.log_text() or "cannot_read" in product.log_text(), what="a word"
            )
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        await eventually(lambda: _served(product), what="service")
        assert servers == {process.pid for process in product.servers().values()}
        assert all(model["in_flight"] == 0 for model in _status(product)["models"])


def _served(product: object) -> bool:
    with contextlib.suppress(OSError):
        body = {"model": "qwen3:8b", "prompt": "hello", "options": {"num_predict": 4}}
        return product.call("POST", "/api/generate", body)[0] == 200  # type: ignore[attr-defined]
    return False


async def test_a_state_directory_that_cannot_be_written_costs_only_what_was_learned(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    (state / "footprints.json").mkdir()  # no file can take its place, as on a full disk
    with running(prepare(tmp_path, _QUICK_POLLS, _FAST, ("--rig", "3090"))) as product:
        assert (await _ask(product)).status == 200
        await eventually(lambda: "footprint_not_stored" in product.log_text(), what="the warning")
        assert (await _ask(product)).status == 200
