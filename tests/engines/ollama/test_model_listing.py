"""Several stores as one list: precedence, same models, and servers that do not answer."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from router.domain.instance import InstanceName, InstanceSpec, InstanceState, InstanceView
from router.engines.ollama.client import OllamaClient, OllamaError, TagRow
from router.engines.ollama.model_listing import Listing, Store, stores_of


class Lister(OllamaClient):
    """A client with a given list."""

    def __init__(self, **digests: str) -> None:
        self.rows = tuple(TagRow(f"{name}:latest", digest) for name, digest in digests.items())
        self.fails = False

    async def tags(self) -> tuple[TagRow, ...]:
        if self.fails:
            raise OllamaError(502, "unreachable")
        return self.rows


FAR, NEAR = InstanceName("far"), InstanceName("near")


def full(name: str) -> str:
    return f"registry.ollama.ai/library/{name}:latest"


async def test_the_shared_store_has_precedence_and_the_same_model_is_on_both() -> None:
    shared, far = Lister(both="1", other="2"), Lister(both="1", other="3", own="4")
    listed = await Listing(lambda: [Store(None, shared), Store(FAR, far)]).read()
    assert listed is not None
    where = {name: (each.row.digest, each.is_shared, set(each.attached_on)) for name, each in listed.items()}
    assert where == {
        full("both"): ("1", True, {"far"}),
        full("other"): ("2", True, set()),
        full("own"): ("4", False, {"far"}),
    }
    assert listed[full("own")].client is far


async def test_the_last_list_of_a_silent_attached_server_is_kept() -> None:
    shared, far = Lister(), Lister(own="4")
    stores = [Store(None, shared), Store(FAR, far)]
    listing = Listing(lambda: stores)
    assert set(await listing.read() or ()) == {full("own")}
    far.fails = True
    assert set(await listing.read() or ()) == {full("own")}
    stores[1] = Store(FAR, None)
    assert set(await listing.read() or ()) == {full("own")}


async def test_a_silent_shared_store_is_an_error_or_none_and_never_empty() -> None:
    shared = Lister()
    shared.fails = True
    with pytest.raises(OllamaError):
        await Listing(lambda: [Store(None, shared)]).read()
    assert await Listing(lambda: [Store(None, None), Store(FAR, Lister(own="4"))]).read() is None
    assert await Listing(list).read() is None


async def test_without_a_shared_store_the_answering_attached_servers_are_listed() -> None:
    far, near = Lister(a="1"), Lister(a="2", b="3")
    far.fails = True
    listing = Listing(lambda: [Store(FAR, far), Store(NEAR, near)])
    assert {each.row.digest for each in (await listing.read() or {}).values()} == {"2", "3"}
    near.fails = True
    assert {each.row.digest for each in (await listing.read() or {}).values()} == {"2", "3"}
    with pytest.raises(OllamaError):
        await Listing(lambda: [Store(FAR, far)]).read()


def _view(name: str, state: InstanceState, *, attached: bool) -> InstanceView:
    return InstanceView(InstanceSpec(InstanceName(name), (), f"http://{name}", attached=attached), state)


def test_spawned_instances_share_one_store_listed_by_any_ready_one() -> None:
    views = [
        _view("far", InstanceState.READY, attached=True),
        _view("a", InstanceState.STARTING, attached=False),
        _view("b", InstanceState.READY, attached=False),
        _view("gone", InstanceState.BACKOFF, attached=True),
    ]
    made: dict[str, Lister] = {}
    client_for: Callable[[str], OllamaClient] = lambda url: made.setdefault(url, Lister())  # noqa: E731
    stores = stores_of(views, client_for)
    assert [(store.attached, store.client) for store in stores] == [
        (None, made["http://b"]), ("far", made["http://far"]), ("gone", None),
    ]  # fmt: skip
    assert stores_of(views[:1], client_for)[0].attached == "far"
    assert stores_of([views[1]], client_for) == [Store(None, None)]
