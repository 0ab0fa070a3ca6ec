"""The models of all stores as one list: each name once, with the stores that hold the very same model.

The shared store must answer. An attached server that does not is taken to hold what it held when it last did: it may
only be starting, and what it has is not forgotten for that. No model is invented for one that never answered.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from router.domain.instance import InstanceName, InstanceState, InstanceView
from router.domain.model_names import canonical
from router.engines.ollama.client import OllamaClient, OllamaError, TagRow


@dataclass(frozen=True, slots=True)
class Store:
    """One store of models."""

    attached: InstanceName | None
    """The attached server whose own it is; None: the one that all spawned instances share."""
    client: OllamaClient | None
    """A server that lists it; None while none is ready."""


def stores_of(views: Iterable[InstanceView], client_for: Callable[[str], OllamaClient]) -> list[Store]:
    """The shared store, if instances were spawned, then each attached server's by name."""
    ordered = sorted(views, key=lambda view: (view.spec.attached, view.spec.name))
    ready = {view.spec.name: client_for(view.spec.url) for view in ordered if view.state is InstanceState.READY}
    spawned = [view.spec.name for view in ordered if not view.spec.attached]
    shared = [Store(None, next((ready[name] for name in spawned if name in ready), None))] if spawned else []
    return shared + [Store(v.spec.name, ready.get(v.spec.name)) for v in ordered if v.spec.attached]


@dataclass(frozen=True, slots=True)
class Listed:
    """One model, and where it is."""

    row: TagRow
    client: OllamaClient
    """A server to ask about it."""
    is_shared: bool
    attached_on: frozenset[InstanceName]


_Rows = tuple[TagRow, ...]


class Listing:
    """`stores`: those there are at the moment, in the order in which a name is looked for."""

    def __init__(self, stores: Callable[[], Sequence[Store]]) -> None:
        self._stores = stores
        self._last: dict[InstanceName, tuple[OllamaClient, _Rows]] = {}

    async def read(self) -> Mapping[str, Listed] | None:
        """By canonical name; None where there is no server to ask, or none of those that share a store.

        Raises:
            OllamaError: the shared store's server could not be asked; where there is none, no attached one could.
        """
        stores = self._stores()
        shared = next((store for store in stores if store.attached is None), None)
        attached = [(store.attached, store.client) for store in stores if store.attached is not None]
        if shared is not None and shared.client is None:
            return None
        listed: dict[str, Listed] = {}
        if shared is not None and shared.client is not None:
            _add(listed, await shared.client.tags(), shared.client, None)
        errors = await asyncio.gather(*(self._look(*each) for each in attached))
        there = [(name, *self._last[name]) for name, _ in attached if name in self._last]
        if shared is None and not there:
            failed = next((error for error in errors if error is not None), None)
            if failed is not None:
                raise failed
            return None
        for name, client, rows in there:
            _add(listed, rows, client, name)
        return listed

    def unheard(self) -> tuple[InstanceName, ...]:
        """Attached servers that have never answered."""
        names = (store.attached for store in self._stores())
        return tuple(name for name in names if name is not None and name not in self._last)

    async def _look(self, name: InstanceName, client: OllamaClient | None) -> OllamaError | None:
        """Reads an attached server's list; what it last said stands where it says nothing."""
        if client is None:
            return None
        try:
            self._last[name] = client, await client.tags()
        except OllamaError as error:
            return error
        return None


def _add(
    listed: dict[str, Listed], rows: Iterable[TagRow], client: OllamaClient, attached: InstanceName | None
) -> None:
    """Adds a store's models. One that stands under its name already with another digest keeps that name."""
    own = frozenset[InstanceName]() if attached is None else frozenset((attached,))
    for row in rows:
        key = key_of(row.name)
        if key is None:
            continue
        there = listed.get(key)
        if there is None:
            listed[key] = Listed(row, client, attached is None, own)
        elif there.row.digest == row.digest:
            listed[key] = Listed(there.row, there.client, there.is_shared, there.attached_on | own)


def key_of(name: str) -> str | None:
    """The one identity of a name in any form; None for what is no name."""
    try:
        return canonical(name)
    except ValueError:
        return None
