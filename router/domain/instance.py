"""One inference server and its state, as frozen values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NewType

from router.domain.gpu import GpuUuid

InstanceName = NewType("InstanceName", str)
"""`gpu0`, `gpu1`, …, `spread`, `cpu`, or a configured name."""


class InstanceState(StrEnum):
    """State of a supervised server; it changes only by the table in `domain/instance_lifecycle.py`."""

    STOPPED = "stopped"
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPING = "stopping"
    BACKOFF = "backoff"
    FATAL = "fatal"


@dataclass(frozen=True, slots=True)
class InstanceSpec:
    """One inference server as configured: its engine, GPUs, address and parallelism."""

    name: InstanceName
    gpus: tuple[GpuUuid, ...]
    """GPUs in the order in which the server lists them; empty for the CPU."""
    url: str
    """`http://127.0.0.1:PORT`, no path."""
    num_parallel: int = 2
    context_length: int = 8192
    kv_cache_type: str = "f16"
    flash_attention: bool | None = None
    """None: the server decides ("auto")."""
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    """Environment variables that the router adds for a spawned server; empty for an attached one."""
    attached: bool = False
    """True if something else runs the server, and the router only uses it."""
    on_demand: bool = False
    """True if the scheduler started it; it is stopped when it has been empty for `instance_idle_seconds`."""
    is_overflow: bool = False
    """True if it serves on the CPU what would be late on the GPUs (`placement.cpu`), and nothing else."""
    engine: str = "ollama"
    """Kind of its engine; it loads only models of that engine."""

    @property
    def is_spread(self) -> bool:
        return len(self.gpus) > 1


@dataclass(frozen=True, slots=True)
class InstanceView:
    """An instance as the scheduler sees it."""

    spec: InstanceSpec
    state: InstanceState
    version: str | None = None
    reason: str = ""
    down_since: float | None = None
    """Since when it has not served; None while it serves, and before its first start has ended."""
