"""Models of several stores as one list: which one a name means, where else it is, and what silence means."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import cast

import aiohttp
import pytest

from router.core.entities import InstanceName, InstanceSpec, InstanceState, InstanceView
from router.fleet.catalog import Catalog
from router.fleet.listing import Store, stores_of
from router.fleet.ollama import OllamaClient, OllamaError
from tests.fleet.scripted import Scripted, failing, scripted

BLOB = "b" * 64

SHARED, NEAR, FAR = None, InstanceName("near"), InstanceName("far")


@dataclass
class Stores:
    """A catalog over the shared store and two attached servers, each with a script of its own."""

    servers: dict[InstanceName | None, Scripted]
    stores: dict[InstanceName | None, Store]
    catalog: Catalog

    def holds(self, where: InstanceName | None, **digests: str) -> None:
        rows = [{"name": f"{name}:latest", "digest": digest} for name, digest in digests.items()]
        self.servers[where].answers["/api/tags"] = {"models": rows}

    def fails(self, where: InstanceName | None) -> None:
        self.servers[where].answers["/api/tags"] = failing(500)

    def is_down(self, where: InstanceName | None) -> None:
        self.stores[where] = Store(where, None)


@asynccontextmanager
async def _stores(*names: InstanceName | None) -> AsyncGenerator[Stores]:
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession())
        show = {"modelfile": f"FROM /m/sha256-{BLOB}"}
        servers = {
            name: await stack.enter_async_context(scripted({"/api/show": show, "/api/tags": {"models": []}}))
            for name in names
        }
        stores = {name: Store(name, OllamaClient(session, servers[name].url)) for name in names}
        catalog = Catalog(lambda: list(stores.values()), lambda: 0.0)
        yield Stores(servers, stores, catalog)
        await catalog.close()


async def test_a_name_means_the_shared_stores_model_before_any_other() -> None:
    async with _stores(SHARED, NEAR, FAR) as town:
        town.holds(SHARED, a="one")
        town.holds(NEAR, a="two", b="three")
        town.holds(FAR, a="one", b="three")
        a, b = await town.catalog.facts("a"), await town.catalog.facts("b")
        assert a is not None
        assert b is not None
        assert (a.digest, a.is_shared, a.attached_on) == ("one", True, {FAR})
        assert (b.digest, b.is_shared, b.attached_on) == ("three", False, {NEAR, FAR})
        assert town.servers[NEAR].paths().count("/api/show") == 1
        assert town.servers[FAR].paths().count("/api/show") == 0


async def test_an_attached_server_that_does_not_answer_is_taken_to_hold_what_it_held() -> None:
    async with _stores(SHARED, NEAR) as town:
        town.holds(NEAR, a="one")
        assert await town.catalog.facts("a") is not None
        town.fails(NEAR)
        await town.catalog.refresh()
        assert town.catalog.known("a") is not None
        town.is_down(NEAR)
        await town.catalog.refresh()
        assert town.catalog.known("a") is not None
        assert await town.catalog.facts("never") is None


async def test_where_a_model_came_to_lie_or_no_longer_lies_is_told_after_a_refresh() -> None:
    async with _stores(SHARED, NEAR) as town:
        town.holds(SHARED, a="one")
        await town.catalog.facts("a")
        town.holds(NEAR, a="one")
        await town.catalog.refresh()
        found = town.catalog.known("a")
        assert found is not None
        assert (found.is_shared, found.attached_on) == (True, {NEAR})
        town.holds(SHARED)
        await town.catalog.refresh()
        found = town.catalog.known("a")
        assert found is not None
        assert (found.is_shared, found.attached_on) == (False, {NEAR})


async def test_the_shared_store_must_answer() -> None:
    async with _stores(SHARED, NEAR) as town:
        town.holds(NEAR, a="one")
        town.fails(SHARED)
        with pytest.raises(OllamaError):
            await town.catalog.facts("a")
        town.is_down(SHARED)
        assert await town.catalog.facts("a") is None


async def test_with_attached_servers_alone_one_that_answers_is_enough() -> None:
    async with _stores(NEAR, FAR) as town:
        town.fails(NEAR)
        town.holds(FAR, a="one")
        found = await town.catalog.facts("a")
        assert found is not None
        assert (found.is_shared, found.attached_on) == (False, {FAR})


async def test_with_attached_servers_alone_of_which_none_ever_answered_the_failure_is_told() -> None:
    async with _stores(NEAR, FAR) as town:
        town.fails(NEAR)
        town.is_down(FAR)
        with pytest.raises(OllamaError):
            await town.catalog.facts("a")


def test_stores_are_the_shared_one_by_any_ready_server_and_then_each_attached_ones() -> None:
    """The client is told by its URL here."""
    session = cast("aiohttp.ClientSession", None)

    def seen(*views: InstanceView) -> list[tuple[str | None, str | None]]:
        stores = stores_of(views, lambda url: OllamaClient(session, url))
        return [(store.attached, store.client and store.client.base_url) for store in stores]

    def one(name: str, state: InstanceState = InstanceState.READY, attached: bool = False) -> InstanceView:
        return InstanceView(InstanceSpec(InstanceName(name), (), f"http://{name}", attached=attached), state)

    down = InstanceState.BACKOFF
    assert seen() == []
    assert seen(one("b"), one("a", down), one("z", attached=True), one("y", down, attached=True)) == [
        (None, "http://b"), ("y", None), ("z", "http://z"),
    ]  # fmt: skip
    assert seen(one("a", down)) == [(None, None)]
    assert seen(one("z", attached=True)) == [("z", "http://z")]
