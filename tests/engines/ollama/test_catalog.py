"""What the catalog caches, when it reads, and what it drops."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from router.domain.model import BlobDigest
from router.engines.ollama.catalog import Catalog
from router.engines.ollama.client import OllamaClient, OllamaError
from router.engines.ollama.model_listing import Store
from tests.support.scripted_server import Scripted, failing, scripted
from tests.support.waiting import eventually

BLOB = "b" * 64


@dataclass
class Town:
    """A catalog over one scripted server that lists the shared store."""

    server: Scripted
    catalog: Catalog
    ready: bool = True
    now: float = 100.0
    gates: dict[str, asyncio.Event] = field(default_factory=dict[str, asyncio.Event])

    def holds(self, *names: str, digest: str = "one") -> None:
        rows = [{"name": name, "digest": digest, "size": 10} for name in names]
        self.server.answers["/api/tags"] = lambda _: self._gated("/api/tags", {"models": rows})

    async def _gated(self, path: str, data: Any) -> web.Response:
        gate = self.gates.get(path)
        if gate is not None:
            await gate.wait()
        return web.json_response(data)

    def show(self, body: Any) -> Any:
        info = {"general.architecture": "x", "x.attention.head_count_kv": [1, 2] if body.get("verbose") else None}
        return self._gated("/api/show", {"modelfile": f"FROM /m/sha256-{BLOB}", "model_info": info})

    def asked(self, path: str) -> int:
        return self.server.paths().count(path)


@asynccontextmanager
async def _store(*names: str) -> AsyncGenerator[Town]:
    async with aiohttp.ClientSession() as session, scripted({}) as server:
        client = OllamaClient(session, server.url)
        town: Town
        catalog = Catalog(lambda: [Store(None, client if town.ready else None)], lambda: town.now)
        town = Town(server, catalog)
        server.answers["/api/show"] = town.show
        town.holds(*names)
        yield town
        await catalog.close()


async def test_a_model_is_found_by_any_form_of_its_name_and_asked_for_once() -> None:
    async with _store("tiny:latest", "me/other:7b") as store:
        forms = ("tiny", "tiny:latest", "library/tiny", "registry.ollama.ai/library/tiny:latest", "TINY")
        found = [await store.catalog.facts(form) for form in forms]
        assert all(facts == found[0] and facts is not None for facts in found)
        assert (store.asked("/api/tags"), store.asked("/api/show")) == (1, 2)
        assert found[0] is not None
        assert (found[0].name, found[0].blob, found[0].weights_bytes) == ("tiny:latest", f"sha256:{BLOB}", 10)
        assert store.catalog.known("tiny") == found[0]
        assert store.catalog.known("me/other:7b") is None
        assert await store.catalog.facts("me/other:7b") is not None


async def test_per_layer_values_are_asked_for_a_second_time_only_where_they_are_missing() -> None:
    async with _store("tiny:latest") as store:
        await store.catalog.facts("tiny")
        shows = [request.body for request in store.server.requests if request.path == "/api/show"]
        assert shows == [{"model": "tiny:latest"}, {"model": "tiny:latest", "verbose": True}]


async def test_an_invalid_name_sends_no_request() -> None:
    async with _store("tiny:latest") as store:
        assert await store.catalog.facts("../etc") is None
        assert await store.catalog.facts("") is None
        assert store.catalog.known("a b") is None
        store.catalog.forget("a b")
        assert store.server.requests == []


async def test_a_new_model_is_found_at_once() -> None:
    async with _store() as store:
        assert await store.catalog.facts("tiny") is None
        store.holds("tiny:latest")
        assert await store.catalog.facts("tiny") is not None


async def test_without_a_server_nothing_is_known_and_nothing_is_forgotten() -> None:
    async with _store("tiny:latest") as store:
        known = await store.catalog.facts("tiny")
        store.ready = False
        await store.catalog.refresh()
        assert await store.catalog.facts("tiny") == known
        assert await store.catalog.facts("other") is None


async def test_a_server_that_fails_is_not_one_without_models() -> None:
    async with _store("tiny:latest") as store:
        known = await store.catalog.facts("tiny")
        store.server.answers["/api/tags"] = failing(500)
        with pytest.raises(OllamaError):
            await store.catalog.facts("other")
        with pytest.raises(OllamaError):
            await store.catalog.refresh()
        assert store.catalog.known("tiny") == known


async def test_a_failure_is_not_remembered() -> None:
    async with _store("tiny:latest") as store:
        store.server.answers["/api/show"] = failing(500)
        with pytest.raises(OllamaError):
            await store.catalog.facts("tiny")
        store.server.answers["/api/show"] = store.show
        assert await store.catalog.facts("tiny") is not None


async def test_a_model_that_is_deleted_while_it_is_asked_for_is_none() -> None:
    async with _store("tiny:latest") as store:
        store.server.answers["/api/show"] = failing(404, b'{"error":"not found"}')
        assert await store.catalog.facts("tiny") is None


async def test_a_cloud_models_stub_is_none_and_not_asked_for() -> None:
    async with _store() as store:
        row = {"name": "gpt-oss:cloud", "digest": "d", "remote_host": "https://ollama.com"}
        store.server.answers["/api/tags"] = {"models": [row]}
        assert await store.catalog.facts("gpt-oss:cloud") is None
        assert store.asked("/api/show") == 0


async def test_a_refresh_forgets_what_changed_or_is_gone_and_keeps_the_rest() -> None:
    async with _store("kept:latest", "gone:latest", "changed:latest") as store:
        for name in ("kept", "gone", "changed"):
            await store.catalog.facts(name)
        rows = [{"name": "kept:latest", "digest": "one"}, {"name": "changed:latest", "digest": "two"}]
        store.server.answers["/api/tags"] = {"models": rows}
        await store.catalog.refresh()
        known = [store.catalog.known(name) is not None for name in ("kept", "gone", "changed")]
        assert known == [True, False, False]
        changed = await store.catalog.facts("changed")
        assert changed is not None
        assert changed.digest == "two"


async def test_the_time_of_the_last_complete_reading_is_that_of_its_beginning() -> None:
    async with _store("tiny:latest") as store:
        assert store.catalog.read_at is None
        store.gates["/api/tags"] = gate = asyncio.Event()
        reading = asyncio.ensure_future(store.catalog.refresh())
        await eventually(lambda: store.asked("/api/tags"))
        store.now = 200.0
        gate.set()
        await reading
        assert store.catalog.read_at == 100.0


async def test_concurrent_lookups_share_one_reading() -> None:
    async with _store("tiny:latest", "other:latest") as store:
        found = await asyncio.gather(*(store.catalog.facts(name) for name in ("tiny", "TINY", "other") * 5))
        assert None not in found
        assert store.asked("/api/tags") <= 2
        assert store.asked("/api/show") == 4


async def test_a_cancelled_caller_does_not_affect_the_others() -> None:
    async with _store("tiny:latest") as store:
        store.gates["/api/show"] = gate = asyncio.Event()
        leaving, staying = (asyncio.ensure_future(store.catalog.facts("tiny")) for _ in range(2))
        await eventually(lambda: store.asked("/api/show"))
        leaving.cancel()
        gate.set()
        assert await staying is not None
        assert leaving.cancelled()


async def test_a_lookup_during_a_reading_that_may_be_too_old_gets_a_new_one() -> None:
    async with _store() as store:
        store.gates["/api/tags"] = gate = asyncio.Event()
        early = asyncio.ensure_future(store.catalog.facts("tiny"))
        await eventually(lambda: store.asked("/api/tags"))
        store.holds("tiny:latest")
        late = asyncio.ensure_future(store.catalog.facts("tiny"))
        gate.set()
        assert await early is None
        assert await late is not None


@pytest.mark.parametrize("way", ["by name", "all"])
async def test_a_lookup_that_was_running_when_the_model_was_forgotten_is_not_cached(way: str) -> None:
    async with _store("tiny:latest") as store:
        store.gates["/api/show"] = gate = asyncio.Event()
        asking = asyncio.ensure_future(store.catalog.facts("tiny"))
        await eventually(lambda: store.asked("/api/show"))
        if way == "all":
            store.catalog.forget_all()
        else:
            store.catalog.forget("library/tiny")
        gate.set()
        assert await asking is not None
        assert store.catalog.known("tiny") is None


async def test_a_forgotten_model_is_looked_up_again() -> None:
    async with _store("tiny:latest", "other:latest") as store:
        for name in ("tiny", "other"):
            await store.catalog.facts(name)
        store.catalog.forget("tiny")
        assert (store.catalog.known("tiny"), store.catalog.known("other") is None) == (None, False)
        store.catalog.forget_all()
        assert store.catalog.known("other") is None
        assert await store.catalog.facts("tiny") is not None


async def test_closing_cancels_running_lookups() -> None:
    async with _store("tiny:latest") as store:
        store.gates["/api/tags"] = asyncio.Event()
        asking = asyncio.ensure_future(store.catalog.facts("tiny"))
        await eventually(lambda: store.asked("/api/tags"))
        await store.catalog.close()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await eventually(lambda: store.server.hung_up == ["/api/tags"])


# --- digests and names ------------------------------------------------------------------------------------------


async def test_what_a_name_meant_before_is_still_known_by_its_digest() -> None:
    async with _store("tiny:latest") as store:
        old = await store.catalog.facts("tiny")
        assert old is not None
        store.holds("tiny:latest", digest="two")
        await store.catalog.refresh()
        new = await store.catalog.facts("tiny")
        assert new is not None
        assert (old.digest, new.digest) == ("one", "two")
        assert await store.catalog.facts_of("tiny:latest", "one") == store.catalog.seen("one") == old
        assert await store.catalog.facts_of("tiny:latest", "two") == new


async def test_an_unknown_digest_is_looked_up_by_name_and_must_match() -> None:
    async with _store("tiny:latest") as store:
        assert store.catalog.seen("one") is None
        assert await store.catalog.facts_of("tiny", "another") is None
        found = await store.catalog.facts_of("tiny", "one")
        assert found is not None
        assert found.digest == "one"


async def test_all_names_of_the_same_weights_are_read_live() -> None:
    async with _store("tiny:latest") as store:
        tiny = await store.catalog.facts("tiny")
        assert tiny is not None
        store.holds("tiny:latest", "alias:latest")
        assert sorted(await store.catalog.names_of(tiny.blob)) == ["alias:latest", "tiny:latest"]
        store.holds("alias:latest")
        await store.catalog.refresh()
        assert await store.catalog.names_of(tiny.blob) == ("alias:latest",)
        assert await store.catalog.names_of(BlobDigest("sha256:other")) == ()


async def test_a_model_whose_weights_are_not_described_is_known_by_its_manifest_and_asked_for_once() -> None:
    async with _store() as store:
        rows = [{"name": "odd:latest", "digest": "one", "size": 9_000_000_000}]
        store.server.answers["/api/tags"] = lambda _: web.json_response({"models": rows})
        store.server.answers["/api/show"] = lambda _: web.json_response(
            {"modelfile": "FROM odd:latest", "model_info": {}}
        )
        first = await store.catalog.facts("odd")
        assert first is not None
        assert (first.is_opaque, first.blob, first.layers, first.weights_bytes) == (
            True, "manifest:one", 0, 9_000_000_000,
        )  # fmt: skip
        assert await store.catalog.facts("odd:latest") is first
        assert (store.asked("/api/tags"), store.asked("/api/show")) == (1, 1)


async def test_a_cloud_models_stub_is_looked_for_again_only_when_it_changed() -> None:
    async with _store() as store:
        rows = [{"name": "big:cloud", "digest": "one", "size": 300, "remote_host": "https://ollama.com"}]
        store.server.answers["/api/tags"] = lambda _: web.json_response({"models": rows})
        for _ in range(3):
            assert await store.catalog.facts("big:cloud") is None
        assert store.asked("/api/tags") == 1
        store.holds("big:cloud", digest="two")
        await store.catalog.refresh()
        assert await store.catalog.facts("big:cloud") is not None


async def test_what_a_server_has_loaded_and_no_name_stands_for_is_looked_for_ever_less_often() -> None:
    async with _store("other:latest") as store:
        asked: list[float] = []
        for _ in range(400):
            before = store.asked("/api/tags")
            assert await store.catalog.facts_of("gone:latest", "digest") is None
            asked += [store.now] * (store.asked("/api/tags") - before)
            store.now += 1.0
        assert [later - earlier for earlier, later in itertools.pairwise(asked)][:8] == [1, 2, 4, 8, 16, 32, 60, 60]


async def test_facts_that_cannot_be_read_fail_ever_less_often_and_at_once_in_between() -> None:
    async with _store("tiny:latest") as store:
        store.server.answers["/api/show"] = failing(500, b'{"error":"unable to read"}')
        for _ in range(60):
            with pytest.raises(OllamaError, match="unable to read"):
                await store.catalog.facts_of("tiny:latest", "one")
            store.now += 1.0
        assert store.asked("/api/show") == 6  # after 0, 1, 3, 7, 15 and 31 s
        store.server.answers["/api/show"] = store.show
        store.now += 60.0
        assert await store.catalog.facts_of("tiny:latest", "one") is not None


async def test_a_change_of_the_list_lets_unreadable_facts_be_asked_for_at_once() -> None:
    async with _store() as store:
        for _ in range(3):
            assert await store.catalog.facts_of("gone:latest", "digest") is None
        assert store.asked("/api/tags") == 1
        store.holds("gone:latest", digest="digest")
        await store.catalog.refresh()
        assert await store.catalog.facts_of("gone:latest", "digest") is not None


async def test_a_change_by_the_router_lets_unreadable_facts_be_asked_for_at_once() -> None:
    async with _store() as store:
        assert await store.catalog.facts_of("gone:latest", "digest") is None
        store.holds("gone:latest", digest="digest")
        store.catalog.forget("gone:latest")
        assert await store.catalog.facts_of("gone:latest", "digest") is not None
