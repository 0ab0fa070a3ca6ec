"""The models of all stores as one list: each name once, with the stores that have the same model.

The shared store must answer. For an attached server that does not answer, its last list is used, because it may just be
starting; until it has answered once, it has none.
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
    """The attached server that owns it; None for the store that all spawned instances share."""
    client: OllamaClient | None
    """Client of a ready server that uses the store; None if there is none."""


def stores_of(views: Iterable[InstanceView], client_for: Callable[[str], OllamaClient]) -> list[Store]:
    """The shared store, if there are spawned instances, then those of the attached servers by name."""
    ordered = sorted(views, key=lambda view: (view.spec.attached, view.spec.name))
    ready = {view.spec.name: client_for(view.spec.url) for view in ordered if view.state is InstanceState.READY}
    spawned = [view.spec.name for view in ordered if not view.spec.attached]
    shared = [Store(None, next((ready[name] for name in spawned if name in ready), None))] if spawned else []
    return shared + [Store(v.spec.name, ready.get(v.spec.name)) for v in ordered if v.spec.attached]


@dataclass(frozen=True, slots=True)
class Listed:
    """One model and its stores."""

    row: TagRow
    client: OllamaClient
    """Client of a server that has it."""
    is_shared: bool
    attached_on: frozenset[InstanceName]


_Rows = tuple[TagRow, ...]


class Listing:
    """Reads the combined list. `stores` returns the current stores in order of precedence."""

    def __init__(self, stores: Callable[[], Sequence[Store]]) -> None:
        self._stores = stores
        self._last: dict[InstanceName, tuple[OllamaClient, _Rows]] = {}

    async def read(self) -> Mapping[str, Listed] | None:
        """The models by canonical name; None if no server is ready, or none of those that share the store.

        Raises:
            OllamaError: the shared store could not be read, or, if there is none, no attached server ever answered.
        """
        stores = self._stores()
        shared = next((store for store in stores if store.attached is None), None)
        attached = [(store.attached, store.client) for store in stores if store.attached is not None]
        if shared is not None and shared.client is None:
            return None
        listed: dict[str, Listed] = {}
        if shared is not None and shared.client is not None:
            _add(listed, await shared.client.tags(), shared.client, None)
        errors = await asyncio.gather(*(self._read_attached(*each) for each in attached))
        lists = [(name, *self._last[name]) for name, _ in attached if name in self._last]
        if shared is None and not lists:
            first_error = next((error for error in errors if error is not None), None)
            if first_error is not None:
                raise first_error
            return None
        for name, client, rows in lists:
            _add(listed, rows, client, name)
        return listed

    def unheard(self) -> tuple[InstanceName, ...]:
        """Attached servers that have never answered."""
        names = (store.attached for store in self._stores())
        return tuple(name for name in names if name is not None and name not in self._last)

    async def _read_attached(self, name: InstanceName, client: OllamaClient | None) -> OllamaError | None:
        """Reads the list of an attached server. If that fails, returns the error and keeps the last list."""
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
    """Adds the models of a store. If a name is already listed with another digest, the earlier model keeps it."""
    attached_on = frozenset[InstanceName]() if attached is None else frozenset((attached,))
    for row in rows:
        key = key_of(row.name)
        if key is None:
            continue
        earlier = listed.get(key)
        if earlier is None:
            listed[key] = Listed(row, client, attached is None, attached_on)
        elif earlier.row.digest == row.digest:
            listed[key] = Listed(earlier.row, earlier.client, earlier.is_shared, earlier.attached_on | attached_on)


def key_of(name: str) -> str | None:
    """The canonical form of a name; None if it is not a valid name."""
    try:
        return canonical(name)
    except ValueError:
        return None
