"""A restart of several instances, one after the other."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from router.domain.instance import InstanceName


class RestartPhase(StrEnum):
    PREPARING = "preparing"
    """Models that are in demand are being loaded elsewhere."""
    DRAINING = "draining"
    """Running requests may end."""
    STARTING = "starting"
    """Its server is being started again."""


@dataclass(frozen=True, slots=True)
class RollingRestart:
    pending: tuple[InstanceName, ...]
    """Instances that are still to be restarted, in order."""
    drain_timeout_seconds: float
    """How long the running requests of each instance may take."""
    current: InstanceName | None = None
    phase: RestartPhase = RestartPhase.PREPARING
    deadline: float = float("inf")
    """When the current phase ends at the latest."""
