"""Measured footprints: bytes on each GPU of a set, which replace the estimate for the next load of the same kind.

A load is measured by the change of used memory between the last reading before it was sent and the first one after it
ended, if the router changed nothing else on these GPUs in between and the result is plausible against the estimate. A
footprint is valid for the same weights, number of GPUs and shares, context, slots, cache type, flash attention and
server version (`FootprintKey`). Readings are passed in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from router.domain.footprint import FootprintKey, FootprintKind
from router.domain.gpu import GpuUuid
from router.domain.reservation import Reservation
from router.scheduler.lru import put

_SHARE_MIN, _SHARE_MAX = 0.5, 1.5
"""Plausible range on each GPU, as a ratio of the estimate; a difference outside has another cause."""


_REPORTED_SHARE_MIN, _TOTAL_SHARE_MAX = 0.97, 1.1
"""Plausible range of the total: the minimum as a ratio of what the server reports, the maximum as one of what it
reports or of the estimate."""


_UNREPORTED_BYTES = 1024**3
"""Allowed on each GPU beyond that: the CUDA context and rounding by the driver."""


_KEPT_MAX = 4096


@dataclass(frozen=True, slots=True)
class MeasurementStart:
    """The GPUs of a load at the time when it was sent."""

    key: FootprintKey
    used_bytes: tuple[int, ...]
    changes: tuple[int, ...]
    is_certain: bool = True
    """True if it is known how the server splits the model. If not, the estimate is a worst case for each GPU, and its
    total is too large."""


@dataclass(slots=True)
class Footprints:
    """All measured footprints. Mutable, owned by `FleetState`."""

    known: dict[FootprintKey, tuple[int, ...]] = field(default_factory=dict[FootprintKey, tuple[int, ...]])
    latest: dict[FootprintKind, FootprintKey] = field(default_factory=dict["FootprintKind", FootprintKey])
    """The newest measurement of each kind: of any context, slots and cache type."""
    changes: dict[GpuUuid, int] = field(default_factory=dict[GpuUuid, int])
    """Number of loads and unloads on each GPU, to detect others during a measurement."""

    def nearest(self, key: FootprintKey) -> FootprintKey | None:
        """The newest measurement that differs at most in context, slots and cache type."""
        latest = self.latest.get(key.kind)
        return latest if latest in self.known else None

    def touched(self, gpus: tuple[GpuUuid, ...]) -> None:
        """A load or unload begins or ends on these GPUs."""
        for gpu in gpus:
            self.changes[gpu] = self.changes.get(gpu, 0) + 1

    def before(
        self, key: FootprintKey, gpus: tuple[GpuUuid, ...], used: Mapping[GpuUuid, int], *, is_certain: bool = True
    ) -> MeasurementStart:
        """Starts a measurement; called after `touched` for the load itself. Keep the result until the load has ended.

        `used`: bytes in use on each GPU by the last reading.
        """
        changes = tuple(self.changes.get(g, 0) for g in gpus)
        return MeasurementStart(key, tuple(used.get(g, 0) for g in gpus), changes, is_certain)

    def after(
        self, before: MeasurementStart, reservation: Reservation, used: Mapping[GpuUuid, int], reported_bytes: int
    ) -> tuple[int, ...] | None:
        """Ends a measurement: bytes that the load uses on each GPU; None if disturbed by another load or implausible.

        The result is stored as the footprint of the load, unless it was not certain how the server splits the model.

        `reported_bytes`: what the server reports to hold on GPUs, without CUDA contexts. If less was measured, another
        program has freed memory meanwhile; if much more than this and the estimate, another one has allocated some.
        """
        gpus = tuple(gpu for gpu, _ in reservation.per_gpu_bytes)
        if before.changes != tuple(self.changes.get(gpu, 0) for gpu in gpus):
            return None
        sizes = tuple(used.get(gpu, 0) - was for gpu, was in zip(gpus, before.used_bytes, strict=True))
        expected = [size for _, size in reservation.per_gpu_bytes]
        total = max(reported_bytes, sum(expected)) if before.is_certain else reported_bytes
        total_max = _TOTAL_SHARE_MAX * total + _UNREPORTED_BYTES * len(sizes)
        if not _REPORTED_SHARE_MIN * reported_bytes <= sum(sizes) <= total_max:
            return None
        if not before.is_certain:
            return tuple(max(0, size) for size in sizes) if _is_covered(sizes, expected) else None
        if not is_plausible(sizes, expected):
            return None
        self.remember(before.key, sizes)
        return sizes

    def remember(self, key: FootprintKey, sizes: tuple[int, ...]) -> None:
        """Stores a measured footprint: bytes on each GPU."""
        put(self.known, key, sizes, _KEPT_MAX)
        self.latest[key.kind] = key


def is_plausible(sizes: Sequence[int], expected: Sequence[int]) -> bool:
    """Returns True if the size on each GPU is near enough to its estimate to have no other cause."""
    return all(_SHARE_MIN * e <= size <= _SHARE_MAX * e for size, e in zip(sizes, expected, strict=True))


def _is_covered(sizes: Sequence[int], expected: Sequence[int]) -> bool:
    """Returns True if no GPU uses much more than its worst case; GPUs that the server did not use show no change."""
    return all(-_UNREPORTED_BYTES <= size <= _SHARE_MAX * e for size, e in zip(sizes, expected, strict=True))
