"""How a server of its own is started, found ready, and ended, with a scripted server in place of the process's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from aiohttp import web

from router.domain.actions import Load, Unload
from router.domain.events import LoadFailed, LoadFinished
from router.domain.ids import LoadId
from router.domain.instance import InstanceName, InstanceSpec
from router.domain.model import NO_MODEL, BlobDigest
from router.engines.openai.supervised import ServedModel, SupervisedEngine
from tests.support.scripted_server import Scripted, scripted
from tests.support.waiting import eventually

_NAME = InstanceName("big.gpu0")
_FACTS = replace(NO_MODEL, name="big:1b", digest="d", blob=BlobDigest("openai:big:1b"), engine="vllm/big:1b")


@dataclass
class _Process:
    exited: asyncio.Event = field(default_factory=asyncio.Event)
    returncode: int | None = None
    stops: int = 0

    async def stop(self, grace_seconds: float) -> bool:
        self.stops += 1
        self.exited.set()
        return True


@dataclass
class _Clock:
    now: float = 0.0

    def __call__(self) -> float:
        self.now += 50.0
        return self.now


def _engine(url: str, process: _Process, started: list[Any], **changes: Any) -> SupervisedEngine:
    served = ServedModel(
        name="big:1b", kind="vllm", engine="vllm/big:1b", start_timeout_seconds=30.0, start_seconds=120.0,
        estimate=lambda spec, _: (7,) * len(spec.gpus), commands={_NAME: ("vllm", "serve")},
        environments={_NAME: {"CUDA_VISIBLE_DEVICES": "GPU-a"}}, signature="s",
    )  # fmt: skip

    def spawn(
        command: Sequence[str], environment: Mapping[str, str], name: InstanceName, on_line: Callable[[str], None]
    ) -> _Process:
        started.append((command, environment, name))
        on_line("CUDA out of memory")
        return process

    spec = InstanceSpec(_NAME, (), url, attached=True, engine=served.engine)
    return SupervisedEngine(replace(served, **changes), _FACTS, [spec], spawn, _Clock())


def _load(url: str) -> Load:
    return Load(LoadId(1), _NAME, url, _FACTS, (), True, 600.0, "", 0)


def _answering(server: Scripted, statuses: list[int]) -> None:
    """Answers real requests with these statuses, the last for ever."""

    def answer(_: Any) -> web.Response:
        return web.json_response({}, status=statuses.pop(0) if len(statuses) > 1 else statuses[0])

    server.answers["/v1/chat/completions"] = answer


async def test_a_load_ends_with_a_real_answer_and_its_time_is_the_price_of_the_next() -> None:
    async with scripted({"/health": {}}) as server:
        _answering(server, [500, 503, 200])
        started: list[Any] = []
        engine = _engine(server.url, _Process(), started)
        assert engine.reload_seconds(_FACTS, 1.0, 1.0) == 120.0
        assert await engine.load(_load(server.url)) == LoadFinished(LoadId(1), 0, 0)
        assert started == [(("vllm", "serve"), {"CUDA_VISIBLE_DEVICES": "GPU-a"}, _NAME)]
        assert server.paths().count("/v1/chat/completions") == 3
        assert engine.reload_seconds(_FACTS, 1.0, 1.0) == 50.0
        spec = InstanceSpec(_NAME, (), server.url, engine="vllm/big:1b")
        assert [row.model for row in await engine.loaded(spec)] == [_FACTS]


async def test_a_server_that_exits_is_a_failed_load_with_its_last_lines() -> None:
    process = _Process(returncode=1)
    process.exited.set()
    async with scripted({}) as server:
        failed = await _engine(server.url, process, []).load(_load(server.url))
    assert isinstance(failed, LoadFailed)
    assert failed.message == "vllm exited with code 1; last lines: CUDA out of memory"
    assert failed.is_memory_short


async def test_a_server_that_never_answers_is_ended_at_the_timeout() -> None:
    process = _Process()
    async with scripted({}) as server:
        failed = await _engine(server.url, process, [], start_timeout_seconds=0.05).load(_load(server.url))
    assert isinstance(failed, LoadFailed)
    assert "was not ready within 0.05 s" in failed.message
    assert process.stops == 1


async def test_a_load_that_is_broken_off_leaves_no_server() -> None:
    process = _Process()
    async with scripted({}) as server, asyncio.TaskGroup() as tasks:
        loading = tasks.create_task(_engine(server.url, process, []).load(_load(server.url)))
        await eventually(lambda: server.requests)
        loading.cancel()
    assert process.stops == 1


async def test_a_server_that_hangs_is_ended_after_some_failed_checks_and_its_model_is_gone() -> None:
    process = _Process()
    async with scripted({"/health": {}}) as server:
        _answering(server, [200])
        engine = _engine(server.url, process, [])
        await engine.load(_load(server.url))
        del server.answers["/health"]
        for _ in range(5):
            await engine.probe(server.url, 5.0)
        assert process.stops == 0
        await engine.probe(server.url, 5.0)
        assert process.stops == 1
        assert await engine.loaded(InstanceSpec(_NAME, (), server.url, engine="vllm/big:1b")) == ()


async def test_an_unload_ends_with_the_process() -> None:
    process = _Process()
    async with scripted({"/health": {}}) as server:
        _answering(server, [200])
        engine = _engine(server.url, process, [])
        await engine.load(_load(server.url))
        finished = await engine.unload(Unload(_NAME, server.url, _FACTS, _FACTS.blob, ""))
    assert (finished.error, process.stops) == (None, 1)
