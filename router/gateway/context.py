"""What the handlers of the gateway share: the engine, the catalog, ways to the instances, limits.

A plain value handed to each handler's constructor; it holds no state of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import aiohttp

from router.core.entities import InstanceState, InstanceView
from router.engine import Engine
from router.errors import NoInstance
from router.fleet.catalog import Catalog


@dataclass(frozen=True, slots=True)
class Limits:
    max_body_bytes: int
    queue_timeout_seconds: float
    first_byte_timeout_seconds: float
    idle_timeout_seconds: float
    connect_timeout_seconds: float = 5.0


@dataclass(frozen=True, slots=True)
class GatewayContext:
    engine: Engine
    catalog: Catalog
    session: aiohttp.ClientSession
    limits: Limits
    default_context_length: int
    cloud: bool = False

    def ready_instances(self) -> list[InstanceView]:
        """Instances that answer, in a stated order: spawned before attached, then by name."""
        views = self.engine.snapshot().instances.values()
        ready = [v for v in views if v.state is InstanceState.READY]
        return sorted(ready, key=lambda v: (v.spec.attached, v.spec.name))

    def primary(self) -> InstanceView:
        """The one instance that management and unroutable requests go to.

        Raises:
            NoInstance: none is ready.
        """
        ready = self.ready_instances()
        if not ready:
            raise NoInstance("no Ollama instance is ready; see /llamayard/status")
        return ready[0]
