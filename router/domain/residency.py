"""A model loaded, loading or unloading on an instance."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from router.domain.ids import LoadId
from router.domain.instance import InstanceName
from router.domain.model import NO_MODEL, BlobDigest, ModelFacts
from router.domain.request import RunnerOptions

STUCK_AFTER_FAILURES = 2
"""Failed unloads in a row after which a replica counts as stuck."""


class ResidencyState(StrEnum):
    PLANNED = "planned"
    """Its room is reserved, and what stands in it is being unloaded."""
    LOADING = "loading"
    READY = "ready"
    UNLOADING = "unloading"


@dataclass(frozen=True, slots=True)
class Residency:
    """One model loaded (or on its way in or out) on one instance."""

    instance: InstanceName
    blob: BlobDigest
    name: str
    """The name it was loaded under; aliases share it."""
    options: RunnerOptions
    state: ResidencyState
    slots: int
    in_flight: int
    per_gpu_bytes: tuple[int, ...]
    """In the instance's GPU order; the estimate until a measurement replaces it."""
    context_length: int
    loaded_at: float
    used_at: float
    expires_at: float | None
    """When the router unloads it if idle; None: never by time. While UNLOADING: when a failed unload is sent again."""
    keep_alive_seconds: float = -1.0
    unloaded_at: float | None = None
    """When its unload ended; it is forgotten once the GPUs were read after that."""
    load_id: LoadId | None = None
    size_bytes: int = 0
    size_vram_bytes: int = 0
    reason: str = ""
    """Why it stands where it stands."""
    model: ModelFacts = NO_MODEL
    unload_failures: int = 0
    """Unloads that have failed in a row."""

    @property
    def is_idle(self) -> bool:
        return self.state is ResidencyState.READY and self.in_flight == 0

    @property
    def is_stuck(self) -> bool:
        """Whether its server has failed to unload it repeatedly."""
        return self.unload_failures >= STUCK_AFTER_FAILURES


ResidencyKey = tuple[InstanceName, BlobDigest]
