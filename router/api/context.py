"""What the API handlers share: the controller, the catalog, access to the instances, limits and rules.

A plain value for each handler's constructor. Its two pieces of state belong to model management: the lock of the
store's single writer, and the models that are being deleted.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import aiohttp

from router.control.controller import Controller
from router.domain.instance import InstanceState, InstanceView
from router.domain.model import ModelFacts
from router.engines.ollama.catalog import Catalog
from router.engines.ollama.endpoint_support import EndpointSupport
from router.errors import NoInstance, ShuttingDown, WaitTimeout
from router.llm_api.inference_request import ModelRules
from router.llm_api.limits import RequestLimits

_SHUTDOWN_RETRY_AFTER_SECONDS = 5


@asynccontextmanager
async def store_turn(writing: asyncio.Lock, limits: RequestLimits) -> AsyncGenerator[None]:
    """Exclusive write access to the shared store, for changes that report no progress while they wait.

    Raises:
        WaitTimeout: other changes took as long as a request may wait; a pull may take hours.
    """
    seconds = limits.queue_timeout_seconds
    try:
        async with asyncio.timeout(seconds):
            await writing.acquire()
    except TimeoutError as error:
        cause = f"another change of the store, such as a pull, has run for {seconds:g} s (queue.timeout_seconds)"
        raise WaitTimeout(f"{cause}; nothing was changed; retry when it has ended") from error
    try:
        yield
    finally:
        writing.release()


@dataclass(frozen=True, slots=True)
class ApiContext:
    controller: Controller
    catalog: Catalog
    session: aiohttp.ClientSession
    limits: RequestLimits
    rules: ModelRules
    endpoint_support: EndpointSupport
    writing: asyncio.Lock
    """Held while the shared store is changed."""
    removing: set[str]
    """Models that are being deleted, as `rules.removing` sees them."""

    def instances(self) -> list[InstanceView]:
        """All instances: spawned before attached, then by name."""
        return sorted(self.controller.snapshot().instances.values(), key=lambda v: (v.spec.attached, v.spec.name))

    def ready_instances(self) -> list[InstanceView]:
        """Ready instances, in the same order."""
        return [view for view in self.instances() if view.state is InstanceState.READY]

    def primary(self) -> InstanceView:
        """The instance for management and for requests that cannot be routed.

        A spawned one if there are any: an attached server never replaces them, because its store is another.

        Raises:
            NoInstance: none is ready.
            ShuttingDown: the router is draining.
        """
        if self.controller.is_closing:
            raise ShuttingDown("the router is shutting down", retry_after_seconds=_SHUTDOWN_RETRY_AFTER_SECONDS)
        spawns = any(not view.spec.attached for view in self.instances())
        ready = [view for view in self.ready_instances() if not (spawns and view.spec.attached)]
        if not ready:
            raise NoInstance("no Ollama instance is ready; see /llamayard/status")
        return ready[0]

    def holder(self, facts: ModelFacts | None) -> InstanceView:
        """An instance to query about the model: the primary, if it has the model or none is known to.

        Raises:
            NoInstance, ShuttingDown: as `primary`.
        """
        primary = self.primary()
        if facts is None or facts.is_on(primary.spec):
            return primary
        return next((view for view in self.ready_instances() if facts.is_on(view.spec)), primary)
