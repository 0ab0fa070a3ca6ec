"""What the handlers of the gateway share: the engine, the catalog, ways to the instances, limits and rules.

A plain value handed to each handler's constructor. Its two pieces of state belong to model management: the lock on the
store's one writer, and the models that are being deleted.
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

_COME_BACK_SECONDS = 5


@dataclass(frozen=True, slots=True)
class Limits:
    max_body_bytes: int
    queue_timeout_seconds: float
    first_byte_timeout_seconds: float
    idle_timeout_seconds: float
    connect_timeout_seconds: float = 5.0


@asynccontextmanager
async def store_turn(writing: asyncio.Lock, limits: Limits) -> AsyncGenerator[None]:
    """Inside, nobody else changes the shared store. For changes that tell nothing while they wait.

    Raises:
        WaitTimeout: others have been at it for as long as a request may wait: a pull may take hours.
    """
    seconds = limits.queue_timeout_seconds
    try:
        async with asyncio.timeout(seconds):
            await writing.acquire()
    except TimeoutError as error:
        words = f"another change of the store, such as a pull, has gone on for {seconds:g} s (queue.timeout_seconds)"
        raise WaitTimeout(f"{words}; nothing was changed, ask again when it has ended") from error
    try:
        yield
    finally:
        writing.release()


@dataclass(frozen=True, slots=True)
class ApiContext:
    controller: Controller
    catalog: Catalog
    session: aiohttp.ClientSession
    limits: Limits
    rules: ModelRules
    endpoint_support: EndpointSupport
    writing: asyncio.Lock
    """Held by whoever changes the shared store."""
    removing: set[str]
    """Models that are being deleted, as `rules.removing` sees them."""

    @property
    def default_context_length(self) -> int:
        return self.rules.default_context_length

    def instances(self) -> list[InstanceView]:
        """All of them in a stated order: spawned before attached, then by name."""
        return sorted(self.controller.snapshot().instances.values(), key=lambda v: (v.spec.attached, v.spec.name))

    def ready_instances(self) -> list[InstanceView]:
        """Those that answer, in the same order."""
        return [view for view in self.instances() if view.state is InstanceState.READY]

    def primary(self) -> InstanceView:
        """The one instance that management and unroutable requests go to: of the spawned ones, if there are any.

        An attached server never takes their place, because its store is another.

        Raises:
            NoInstance: none is ready.
            ShuttingDown: nothing may begin any more.
        """
        if self.controller.is_closing:
            raise ShuttingDown("the router is shutting down", retry_after_seconds=_COME_BACK_SECONDS)
        spawns = any(not view.spec.attached for view in self.instances())
        ready = [view for view in self.ready_instances() if not (spawns and view.spec.attached)]
        if not ready:
            raise NoInstance("no Ollama instance is ready; see /llamayard/status")
        return ready[0]

    def holder(self, facts: ModelFacts | None) -> InstanceView:
        """An instance that can be asked about the model: the primary, if that has it or nobody is known to.

        Raises:
            NoInstance, ShuttingDown: as `primary`.
        """
        primary = self.primary()
        if facts is None or facts.is_on(primary.spec):
            return primary
        return next((view for view in self.ready_instances() if facts.is_on(view.spec)), primary)
