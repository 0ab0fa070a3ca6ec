"""A model that is planned, loading, loaded or unloading on an instance."""

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
    """Its room is reserved; models that are in the way are being unloaded."""
    LOADING = "loading"
    READY = "ready"
    UNLOADING = "unloading"


@dataclass(frozen=True, slots=True)
class Residency:
    """One model on one instance: a replica, or one that is planned, loading or unloading."""

    instance: InstanceName
    blob: BlobDigest
    name: str
    """The name under which it was loaded; aliases share the residency."""
    options: RunnerOptions
    state: ResidencyState
    slots: int
    in_flight: int
    per_gpu_bytes: tuple[int, ...]
    """In the GPU order of the instance; an estimate until it is measured."""
    context_length: int
    loaded_at: float
    used_at: float
    expires_at: float | None
    """When it is unloaded if it stays idle; None: never. While UNLOADING: when a failed unload is sent again."""
    keep_alive_seconds: float = -1.0
    unloaded_at: float | None = None
    """When its unload ended; the residency is dropped after the next reading of the GPUs."""
    load_id: LoadId | None = None
    size_bytes: int = 0
    size_vram_bytes: int = 0
    reason: str = ""
    """Why it was loaded on this instance."""
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


_ROUNDING_SHARE = 0.005


def is_spill(model: ModelFacts, size_bytes: int, size_vram_bytes: int) -> bool:
    """Returns True where a loaded model is partly or wholly on the CPU.

    Only whole layers go to the CPU: less than half a layer, or 0.5 % of all, is a server's rounding. A server since
    0.30 that sees no GPU reports 0 of 0 bytes; of a model in an unknown format (`is_opaque`) that says nothing.
    """
    if not size_vram_bytes and model.weights_bytes and not model.is_opaque:
        return True
    half_layer = model.weights_bytes / (model.layers + 1) / 2
    return size_bytes - size_vram_bytes > max(_ROUNDING_SHARE * size_bytes, half_layer)


def cpu_ratio(size_bytes: int, size_vram_bytes: int) -> float:
    """The share of a spilled model that is on the CPU, from 0 to 1."""
    return 1 - size_vram_bytes / size_bytes if size_vram_bytes else 1.0


ResidencyKey = tuple[InstanceName, BlobDigest]
