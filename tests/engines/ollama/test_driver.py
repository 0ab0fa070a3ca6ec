"""Loads and unloads: what is sent, what counts as done, and names that mean another model now."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from router.domain.actions import Load, Unload
from router.domain.events import LoadFailed, LoadFinished, UnloadFinished
from router.domain.ids import LoadId
from router.domain.instance import InstanceName
from router.domain.measured_speed import MeasuredSpeed
from router.domain.model import BlobDigest, ModelFacts
from router.domain.snapshot import Snapshot
from router.engines.ollama.client import OllamaClient
from router.engines.ollama.driver import OllamaDriver, is_memory_short, temporary_tag_for
from tests.scheduler.builders import key, model, residency, snapshot, view
from tests.support.scripted_server import Scripted, failing, hanging, scripted
from tests.support.waiting import eventually

TINY = model("tiny:latest", layers=2, digest="d1")
GPU0 = InstanceName("gpu0")


def load(of: ModelFacts, *, expects_gpu: bool = True, seconds: float = 5.0) -> Load:
    return Load(LoadId(7), GPU0, "http://unused", of, (("num_ctx", 2048),), expects_gpu, seconds, "why")


def unload(of: ModelFacts) -> Unload:
    return Unload(GPU0, "http://unused", of, of.blob, "why")


@dataclass
class Names:
    """The catalog: what names and digests mean."""

    by_name: dict[str, ModelFacts] = field(default_factory=dict[str, ModelFacts])
    by_digest: dict[str, ModelFacts] = field(default_factory=dict[str, ModelFacts])

    async def facts_of(self, name: str, digest: str) -> ModelFacts | None:
        named = self.by_name.get(name)
        return self.by_digest.get(digest) or (named if named is not None and named.digest == digest else None)

    async def facts(self, name: str) -> ModelFacts | None:
        return self.by_name.get(name)

    async def names_of(self, blob: BlobDigest) -> tuple[str, ...]:
        return tuple(name for name, facts in self.by_name.items() if facts.blob == blob)


@dataclass
class Bench:
    """A driver over a scripted server, which lists `loaded`."""

    server: Scripted
    driver: OllamaDriver
    names: Names
    writing: asyncio.Lock
    facts: Snapshot
    loaded: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    ps_fails: int = 0

    def list(self, name: str, digest: str, size: int = 100, on_gpus: int = 100) -> None:
        self.loaded.append({"name": name, "digest": digest, "size": size, "size_vram": on_gpus})

    def ps(self, _: Any) -> web.Response:
        if self.ps_fails:
            self.ps_fails -= 1
            return web.Response(status=500)
        return web.json_response({"models": self.loaded})

    def goes_on_unload(self, then: Callable[[], None] | None = None) -> None:
        """Makes the server unload at once."""

        def answer(body: Any) -> web.Response:
            if body["keep_alive"] == 0:
                self.loaded.clear()
            if then is not None:
                then()
            return web.json_response({"done": True})

        self.server.answers["/api/generate"] = answer

    def bodies(self, path: str) -> list[Any]:
        return [request.body for request in self.server.requests if request.path == path]


@asynccontextmanager
async def bench(*, attached: bool = False, unload_seconds: float = 5.0) -> AsyncGenerator[Bench]:
    async with aiohttp.ClientSession() as session, scripted({"/api/generate": {"done": True}}) as server:
        names, writing = Names({TINY.name: TINY}, {TINY.digest: TINY}), asyncio.Lock()
        ours = view("gpu0", 0)
        one = replace(ours, spec=replace(ours.spec, attached=attached))
        held: Bench
        driver = OllamaDriver(
            lambda _: OllamaClient(session, server.url, 5.0), names, lambda: held.facts, writing, unload_seconds
        )
        held = Bench(server, driver, names, writing, snapshot([], [one]))
        server.answers["/api/ps"] = held.ps
        yield held


# --- loads ------------------------------------------------------------------------------------------------------


async def test_a_load_requests_all_layers_and_reports_the_listed_sizes() -> None:
    async with bench() as on:
        on.list("tiny:latest", "d1", 100, 90)
        assert await on.driver.load(load(TINY)) == LoadFinished(LoadId(7), 100, 90)
        (asked,) = on.bodies("/api/generate")
        assert asked["options"] == {"num_ctx": 2048, "num_gpu": 3}


async def test_a_load_for_cpu_overflow_measures_the_model_with_a_short_answer() -> None:
    figures = {"prompt_eval_count": 200, "prompt_eval_duration": 4_000_000_000, "eval_count": 16,
               "eval_duration": 1_600_000_000}  # fmt: skip
    async with bench() as on:
        on.list("tiny:latest", "d1", 100, 0)
        on.server.answers["/api/generate"] = figures
        asked = replace(load(TINY, expects_gpu=False), measures_speed=True)
        assert await on.driver.load(asked) == LoadFinished(LoadId(7), 100, 0, MeasuredSpeed(0.02, 0.1))
        _, measured = on.bodies("/api/generate")
        assert measured["options"] == {"num_ctx": 2048, "num_predict": 16, "temperature": 0}
        assert len(measured["prompt"].split()) >= 150


@pytest.mark.parametrize("answer", [{"done": True}, failing(500, b'{"error": "no"}')])
async def test_a_model_that_cannot_be_measured_is_loaded_without_a_speed(answer: Any) -> None:
    async with bench() as on:
        on.list("tiny:latest", "d1", 100, 0)
        on.server.answers["/api/generate"] = lambda body: (
            web.json_response({"done": True}) if "prompt" not in body or isinstance(answer, dict) else answer(body)
        )
        asked = replace(load(TINY, expects_gpu=False), measures_speed=True)
        assert await on.driver.load(asked) == LoadFinished(LoadId(7), 100, 0, None)


@pytest.mark.parametrize(
    ("of", "expects_gpu"),
    [(TINY, False), (replace(TINY, is_opaque=True), True), (replace(TINY, parameters=(("num_gpu", "1"),)), True)],
)
async def test_layers_are_left_alone_without_gpus_and_where_the_model_says_how_many(
    of: ModelFacts, expects_gpu: bool
) -> None:
    async with bench() as on:
        on.list("tiny:latest", "d1")
        await on.driver.load(load(of, expects_gpu=expects_gpu))
        (asked,) = on.bodies("/api/generate")
        assert asked["options"] == {"num_ctx": 2048}


@pytest.mark.parametrize("was_seen", [True, False])
async def test_a_load_listed_under_another_name_of_the_weights_counts(was_seen: bool) -> None:
    """Even if the name was never requested, for example when an attached server had loaded it before."""
    async with bench() as on:
        alias = replace(TINY, name="alias:latest", digest="d2")
        (on.names.by_digest if was_seen else on.names.by_name)["d2" if was_seen else "alias:latest"] = alias
        on.list("alias:latest", "d2", 50, 50)
        assert await on.driver.load(load(TINY)) == LoadFinished(LoadId(7), 50, 50)


async def test_a_load_that_is_not_listed_afterwards_failed() -> None:
    async with bench() as on:
        on.list("other:latest", "d9")
        failed = await on.driver.load(load(TINY))
        assert isinstance(failed, LoadFailed)
        assert (failed.status, failed.message) == (502, "gpu0 loaded 'tiny:latest' but does not list it")


async def test_a_refused_load_has_the_servers_status_and_message() -> None:
    async with bench() as on:
        on.server.answers["/api/generate"] = failing(500, b'{"error":"cudaMalloc failed"}')
        assert await on.driver.load(load(TINY)) == LoadFailed(LoadId(7), 500, "cudaMalloc failed")


async def test_a_load_whose_server_is_unreachable_is_lost_and_not_refused() -> None:
    async with bench() as on, aiohttp.ClientSession() as session:
        nobody = OllamaClient(session, "http://127.0.0.1:1", 5.0)
        driver = OllamaDriver(lambda _: nobody, on.names, lambda: on.facts, on.writing)
        failed = await driver.load(load(TINY))
        assert isinstance(failed, LoadFailed)
        assert (failed.status, failed.is_lost) == (502, True)


async def test_a_load_ends_at_its_deadline() -> None:
    async with bench() as on:
        on.server.answers["/api/generate"] = lambda _: hanging()
        failed = await on.driver.load(load(TINY, seconds=1.0))
        assert isinstance(failed, LoadFailed)
        assert failed.status == 504
        await eventually(lambda: on.server.hung_up)


async def test_listing_is_retried_when_it_fails() -> None:
    async with bench() as on:
        on.list("tiny:latest", "d1")
        on.ps_fails = 2
        assert isinstance(await on.driver.load(load(TINY)), LoadFinished)
        on.ps_fails = 3
        assert isinstance(await on.driver.load(load(TINY)), LoadFailed)


# --- unloads ----------------------------------------------------------------------------------------------------


async def test_an_unload_is_done_when_the_model_is_no_longer_listed() -> None:
    async with bench() as on:
        on.list("tiny:latest", "d1")
        unloading = asyncio.ensure_future(on.driver.unload(unload(TINY)))
        await eventually(lambda: len(on.bodies("/api/ps")) >= 2)
        assert not unloading.done()
        on.loaded.clear()
        assert await unloading == UnloadFinished(GPU0, TINY.blob)
        assert on.bodies("/api/generate") == [{"model": "tiny:latest", "keep_alive": 0, "stream": False}]


async def test_an_unload_not_done_by_the_deadline_failed() -> None:
    async with bench(unload_seconds=0.3) as on:
        on.list("tiny:latest", "d1")
        done = await on.driver.unload(unload(TINY))
        assert done.error is not None
        assert "still loaded 0.3 s after" in done.error


async def test_a_refused_unload_failed_with_the_servers_message() -> None:
    async with bench() as on:
        on.server.answers["/api/generate"] = failing(500, b'{"error":"no"}')
        assert await on.driver.unload(unload(TINY)) == UnloadFinished(GPU0, TINY.blob, "no")


async def test_a_model_whose_name_means_another_now_is_unloaded_by_another_name() -> None:
    async with bench() as on:
        on.list("tiny:latest", "d1")
        on.names.by_name = {"tiny:latest": model("tiny:latest", blob="sha256:new"), "alias:latest": TINY}
        on.goes_on_unload()
        assert (await on.driver.unload(unload(TINY))).error is None
        assert [body["model"] for body in on.bodies("/api/generate")] == ["alias:latest"]
        assert "/api/create" not in on.server.paths()


async def test_a_model_without_a_name_is_unloaded_by_a_temporary_name() -> None:
    async with bench() as on:
        on.list("tiny:latest", "d1")
        on.names.by_name = {}
        on.server.answers |= {"/api/create": {"status": "success"}, "/api/delete": {}}
        on.goes_on_unload(lambda: held.append(on.writing.locked()))
        held: list[bool] = []
        assert (await on.driver.unload(unload(TINY))).error is None
        temporary_tag = temporary_tag_for(TINY.blob)
        assert [path for path in on.server.paths() if path != "/api/ps"] == [
            "/api/create", "/api/generate", "/api/delete",
        ]  # fmt: skip
        assert [body["model"] for body in on.bodies("/api/generate")] == [temporary_tag]
        assert held == [True]
        assert not on.writing.locked()


async def test_a_temporary_name_stays_while_another_instance_needs_it() -> None:
    async with bench() as on:
        on.list("tiny:latest", "d1")
        on.names.by_name = {}
        on.facts = snapshot([], [view("gpu0", 0), view("gpu1", 1)], [residency("gpu1", TINY, 1)])
        on.server.answers |= {"/api/create": {"status": "success"}, "/api/delete": {}}
        on.goes_on_unload()
        assert (await on.driver.unload(unload(TINY))).error is None
        assert "/api/delete" not in on.server.paths()
        assert key("gpu1", TINY) in on.facts.residencies


async def test_a_temporary_name_is_removed_even_if_the_unload_fails() -> None:
    async with bench() as on:
        on.names.by_name = {}
        on.server.answers |= {"/api/create": {"status": "success"}, "/api/delete": {}}
        on.server.answers["/api/generate"] = failing(500, b'{"error":"no"}')
        assert (await on.driver.unload(unload(TINY))).error == "no"
        assert "/api/delete" in on.server.paths()
        assert not on.writing.locked()


async def test_an_attached_servers_store_is_not_written_to() -> None:
    async with bench(attached=True) as on:
        on.list("tiny:latest", "d1")
        on.names.by_name = {}
        on.goes_on_unload()
        assert (await on.driver.unload(unload(TINY))).error is None
        assert [body["model"] for body in on.bodies("/api/generate")] == ["tiny:latest"]


# --- what a killed router left ------------------------------------------------------------------------------------


async def test_temporary_names_of_a_killed_router_are_removed_and_no_others() -> None:
    async with bench() as on:
        names = ["tiny:latest", "llamayard-unload:aaaaaaaaaaaa", temporary_tag_for(TINY.blob)]
        on.server.answers |= {"/api/tags": {"models": [{"name": name} for name in names]}, "/api/delete": {}}
        on.facts = snapshot([], [view("gpu0", 0)], [residency("gpu0", TINY, 1)])
        assert await on.driver.clear_leftovers()
        assert on.bodies("/api/delete") == [{"model": "llamayard-unload:aaaaaaaaaaaa"}]
        assert not on.writing.locked()


async def test_nothing_is_cleared_while_no_server_is_ready_or_the_store_is_being_changed() -> None:
    async with bench(attached=True) as on:
        assert not await on.driver.clear_leftovers()
        assert on.server.requests == []
    async with bench() as on, on.writing:
        assert not await on.driver.clear_leftovers()
        assert on.server.requests == []


def test_the_temporary_name_depends_on_the_weights() -> None:
    one, other = (
        temporary_tag_for(BlobDigest("sha256:" + "a" * 64)),
        temporary_tag_for(BlobDigest("sha256:" + "b" * 64)),
    )
    assert one == "llamayard-unload:aaaaaaaaaaaa"
    assert one != other


@pytest.mark.parametrize(
    ("message", "is_short"),
    [
        ("llama runner process has terminated: cudaMalloc failed: out of memory", True),
        ("CUDA error: out of memory", True),
        ("unable to allocate CUDA0 buffer", True),
        ("memory layout cannot be allocated with num_gpu = 81", True),
        ("model requires more system memory (71.5 GiB) than is available (23.0 GiB)", False),
        ("llama runner process has terminated: signal: killed", False),
    ],
)
def test_errors_of_too_little_gpu_memory_are_told_from_others(message: str, is_short: bool) -> None:
    assert is_memory_short(message) is is_short
