"""The Ollama engine: the one class that answers all that the router asks of an engine (`engines/base.py`).

It composes the modules beside it: `OllamaRules` for the scheduler, `OllamaServer` for the supervisor, the catalog for
models and their facts, the driver for loads and unloads, and the endpoint support for paths.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable

import aiohttp

from router.domain.actions import Load, Unload
from router.domain.events import LoadedModel, LoadFailed, LoadFinished, UnloadFinished
from router.domain.instance import InstanceSpec
from router.domain.model import ModelFacts
from router.domain.snapshot import Snapshot
from router.engines.ollama.catalog import Catalog
from router.engines.ollama.client import OllamaClient
from router.engines.ollama.driver import OllamaDriver
from router.engines.ollama.endpoint_support import EndpointSupport
from router.engines.ollama.http_get import KeptConnections
from router.engines.ollama.instance_plan import InstancePlan, on_demand_instance
from router.engines.ollama.model_listing import Store, stores_of
from router.engines.ollama.rules import OllamaRules
from router.engines.ollama.server import OllamaServer


class OllamaEngine(OllamaRules, OllamaServer):
    """Satisfies `Engine`. Belongs to one event loop; `close` ends what is under way."""

    def __init__(
        self,
        command: tuple[str, ...],
        plan: InstancePlan,
        session: aiohttp.ClientSession,
        snapshot: Callable[[], Snapshot],
        clock: Callable[[], float],
        writing: asyncio.Lock,
        is_elsewhere: Callable[[str], bool] = lambda _: False,
    ) -> None:
        """`session` stays the caller's. `clock` is monotonic. `writing` is held while the shared store changes.
        `is_elsewhere`: whether another engine serves the model with that name."""
        super().__init__(command, session.headers)
        self._plan = plan
        self._session = session
        self._snapshot = snapshot
        self._is_elsewhere = is_elsewhere
        self._lists = KeptConnections(session.headers)
        self._clients: dict[str, OllamaClient] = {}
        self.catalog = Catalog(self._stores, clock)
        self._endpoint_support = EndpointSupport(session)
        self._driver = OllamaDriver(self.client_for, self.catalog, snapshot, writing)

    def client_for(self, url: str) -> OllamaClient:
        """The client of the server at `url`."""
        client = self._clients.get(url)
        if client is None:
            client = self._clients[url] = OllamaClient(self._session, url, lists=self._lists)
        return client

    def _stores(self) -> list[Store]:
        views = self._snapshot().instances.values()
        return stores_of((view for view in views if view.spec.engine == self.kind), self.client_for)

    @property
    def endpoint_support(self) -> EndpointSupport:
        return self._endpoint_support

    async def close(self) -> None:
        await self.catalog.close()
        self._lists.close()

    # --- instances -----------------------------------------------------------------------------------------

    def on_demand_instance(self, spec: InstanceSpec, port: int) -> InstanceSpec:
        return on_demand_instance(spec, self._plan, port)

    # --- loads ---------------------------------------------------------------------------------------------

    async def load(self, load: Load) -> LoadFinished | LoadFailed:
        return await self._driver.load(load)

    async def unload(self, unload: Unload) -> UnloadFinished:
        return await self._driver.unload(unload)

    # --- models --------------------------------------------------------------------------------------------

    async def loaded(self, spec: InstanceSpec) -> tuple[LoadedModel, ...]:
        rows = await self.client_for(spec.url).ps()
        return tuple([await self._with_facts(row) for row in rows])

    async def _with_facts(self, row: LoadedModel) -> LoadedModel:
        """The row with the facts of what was loaded, even if its name means another model by now."""
        facts = await self.catalog.facts_of(row.name, row.digest)
        return row if facts is None else dataclasses.replace(row, model=facts)

    async def refresh(self) -> None:
        await self.catalog.refresh()

    async def facts(self, name: str) -> ModelFacts | None:
        return None if self._is_elsewhere(name) else await self.catalog.facts(name)

    async def tidy(self) -> bool:
        return await self._driver.clear_leftovers()
