"""What the API handlers share: the controller, the catalog, access to the instances, limits and rules.

A plain value for each handler's constructor. Two pieces of state belong to model management: the lock of the
store's single writer, and the models that are being deleted. The third is set once, at the end: what cut requests off.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp

from router.api.management_rules import ManagementRules
from router.control.controller import Controller
from router.domain.instance import InstanceSpec, InstanceState, InstanceView
from router.domain.model import ModelFacts
from router.domain.snapshot import Snapshot
from router.engines.ollama.catalog import Catalog
from router.engines.ollama.client import UNREACHABLE, OllamaError
from router.engines.ollama.endpoint_support import EndpointSupport
from router.engines.ollama.rules import KIND as OLLAMA
from router.engines.openai.servers import AttachedModels
from router.errors import (
    UNREACHABLE_RETRY_AFTER_SECONDS,
    BadRequest,
    InstanceLost,
    InstanceUnreachable,
    ModelNotFound,
    NoInstance,
    QueueFull,
    RouterError,
    ShuttingDown,
    WaitTimeout,
)
from router.llm_api.inference_request import ModelRules
from router.llm_api.limits import RequestLimits
from router.scheduler.placement.candidates import is_alive
from router.scheduler.placement.explain import explain_states

SHUTDOWN_RETRY_AFTER_SECONDS = 5


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


def lost_by(error: Exception, words: str) -> InstanceLost:
    """The error of a request that a server did not answer, by the library's."""
    return (InstanceUnreachable if isinstance(error, aiohttp.ClientConnectorError) else InstanceLost)(words)


class Cutoff:
    """What ended the requests that were still running when the router stopped waiting for them."""

    error: RouterError | None = None

    def lost(self, words: str, error: Exception | None = None) -> RouterError:
        """The error of a request whose server is gone: `words`, unless the router stopped that server."""
        return self.error or (InstanceLost(words) if error is None else lost_by(error, words))


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
    cutoff: Cutoff = field(default_factory=Cutoff)
    management: ManagementRules = field(default_factory=ManagementRules)
    attached: AttachedModels = field(default_factory=lambda: AttachedModels(()))
    """Models of servers that are not Ollama. Their names come before those of the store."""

    def instances(self) -> list[InstanceView]:
        """All instances: spawned before attached, then by name."""
        return sorted(self.controller.snapshot().instances.values(), key=_order)

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
            raise ShuttingDown("the router is shutting down", retry_after_seconds=SHUTDOWN_RETRY_AFTER_SECONDS)
        ready = sorted(_primaries(self.controller.snapshot()), key=_order)
        if not ready:
            words = "no Ollama instance is ready: " + explain_states(self.controller.snapshot())
            raise NoInstance(words, retry_after_seconds=UNREACHABLE_RETRY_AFTER_SECONDS)
        return ready[0]

    async def ready_primary(self) -> InstanceView:
        """Returns `primary` once there is one: waits for servers that are starting or being restarted.

        Raises:
            NoInstance: none came.
            QueueFull: as many requests as the queue holds wait for one already.
            ShuttingDown: the router is draining.
        """
        spawns = any(not spec.attached for spec in self._ollamas())

        def may_be_primary(spec: InstanceSpec) -> bool:
            return spec.engine == OLLAMA and not (spawns and spec.attached)

        await self._until(lambda snapshot: bool(_primaries(snapshot)), may_be_primary)
        return self.primary()

    async def required_model(self, name: str) -> ModelFacts:
        """Facts of a model for an operator.

        Raises:
            ModelNotFound: no server has it.
            NoInstance, EngineError: as `find_model`.
        """
        facts = await self.find_model(name)
        if facts is None:
            raise ModelNotFound(f"model '{name}' not found: see `ollama list`, or pull it")
        return facts

    async def find_model(self, name: str) -> ModelFacts | None:
        """Facts of a model; None only where no server has it.

        Raises:
            ModelNotFound: no server has it, and none is there to say so in its own words.
            NoInstance: a server that may have it is down.
            EngineError: a server could not be asked, or could not say.
        """
        declared = self.attached.known(name)
        if declared is not None:
            return declared
        if not self.has_ollama:
            raise ModelNotFound(f"model '{name}' not found")
        await self.ready_primary()
        try:
            facts = await self.catalog.facts(name)
        except OllamaError as error:
            if error.status != UNREACHABLE:
                raise
            words = f"the server that has model '{name}' does not answer: {error.message}"
            raise NoInstance(words, retry_after_seconds=UNREACHABLE_RETRY_AFTER_SECONDS) from error
        if facts is None:
            self.refuse_unheard(name)
        return facts

    @property
    def has_ollama(self) -> bool:
        """Whether there is any Ollama server, running or not."""
        return bool(self._ollamas())

    def _ollamas(self) -> list[InstanceSpec]:
        return [v.spec for v in self.controller.snapshot().instances.values() if v.spec.engine == OLLAMA]

    def refuse_attached(self, name: str, verb: str) -> None:
        """Refuses to change a model of a server that is not Ollama.

        Raises:
            BadRequest: it is one.
        """
        facts = self.attached.known(name) if name else None
        if facts is not None:
            servers = ", ".join(f"{s.name} ({s.kind})" for s in self.attached.servers_of(facts))
            raise BadRequest(
                f"model '{facts.name}' is served by {servers}, not from the model store: it cannot be {verb} here "
                "(instances[].models)"
            )

    def refuse_unheard(self, name: str) -> None:
        """Refuses a model that no server has while a server that may have it has not been heard yet.

        Raises:
            NoInstance: there is one.
        """
        unheard = self.catalog.unheard()
        if unheard:
            words = f"no running server has model '{name}', and {', '.join(unheard)} has not answered yet"
            raise NoInstance(words, retry_after_seconds=UNREACHABLE_RETRY_AFTER_SECONDS)

    async def holder(self, facts: ModelFacts | None) -> InstanceView:
        """An instance to query about the model: the primary, if none is known to have it. Waits as `ready_primary`.

        Raises:
            NoInstance: none that has it is ready.
            QueueFull, ShuttingDown: as `ready_primary`.
        """
        if facts is None:
            return await self.ready_primary()
        await self._until(lambda snapshot: any(facts.is_on(view.spec) for view in _ready(snapshot)), facts.is_on)
        view = next((view for view in self.ready_instances() if facts.is_on(view.spec)), None)
        if view is None:
            words = f"no instance that has model '{facts.name}' is running: "
            words += explain_states(self.controller.snapshot())
            raise NoInstance(words, retry_after_seconds=UNREACHABLE_RETRY_AFTER_SECONDS)
        return view

    async def _until(self, is_served: Callable[[Snapshot], bool], may_serve: Callable[[InstanceSpec], bool]) -> None:
        """Waits until that is so, or no instance that may serve is expected any more."""
        controller = self.controller

        def is_decided(snapshot: Snapshot) -> bool:
            if is_served(snapshot) or controller.is_closing:
                return True
            views = snapshot.instances.values()
            return not any(may_serve(view.spec) and is_alive(snapshot, view) for view in views)

        if is_decided(controller.snapshot()):
            return
        limit = controller.snapshot().policy.queue_limit
        if controller.watcher_count >= limit:
            words = f"server busy: {limit} requests (queue.limit) wait for an instance to start"
            raise QueueFull(words, retry_after_seconds=UNREACHABLE_RETRY_AFTER_SECONDS)
        await controller.until(is_decided, self.limits.queue_timeout_seconds)


def _order(view: InstanceView) -> tuple[bool, str]:
    return view.spec.attached, view.spec.name


def _ready(snapshot: Snapshot) -> list[InstanceView]:
    return [view for view in snapshot.instances.values() if view.state is InstanceState.READY]


def _primaries(snapshot: Snapshot) -> list[InstanceView]:
    """Ready instances that may be the primary one."""
    ollamas = [view for view in snapshot.instances.values() if view.spec.engine == OLLAMA]
    spawns = any(not view.spec.attached for view in ollamas)
    return [v for v in ollamas if v.state is InstanceState.READY and not (spawns and v.spec.attached)]
