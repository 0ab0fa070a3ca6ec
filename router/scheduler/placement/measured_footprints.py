"""Footprints that loads have shown: bytes on each GPU of a set, which replace the estimate for the next such load.

A footprint is measured where nothing else changed on the GPUs between the last reading before a load was sent and the
first one after it had ended; whatever is implausible against the estimate is not believed. It belongs to the weights,
the number of GPUs and their shares, the context, the slots, the type of the cache, flash attention and the server's
version. It reads no GPU: readings are passed in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from router.domain.footprint import FootprintKey, FootprintKind
from router.domain.gpu import GpuUuid
from router.domain.reservation import Reservation
from router.scheduler.lru import put

_LEAST_SHARE, _MOST_SHARE = 0.5, 1.5
"""Of the estimate: what lies outside has another cause."""


_TOLD_SHARE, _MOST_TOTAL_SHARE = 0.97, 1.1


_UNTOLD_BYTES = 1024**3
"""Beyond that on each GPU: the CUDA context and what the driver rounds up."""


_KEPT_MAX = 4096


@dataclass(frozen=True, slots=True)
class MeasurementStart:
    """How the GPUs of a load were when it was sent."""

    key: FootprintKey
    used_bytes: tuple[int, ...]
    changes: tuple[int, ...]
    is_certain: bool = True
    """Whether it was known how the server shares the model out: else more is expected than it takes in all."""


@dataclass(slots=True)
class Footprints:
    """What was measured, and what is being measured."""

    known: dict[FootprintKey, tuple[int, ...]] = field(default_factory=dict[FootprintKey, tuple[int, ...]])
    latest: dict[FootprintKind, FootprintKey] = field(default_factory=dict["FootprintKind", FootprintKey])
    """What was measured last, by all but context, slots and cache."""
    changes: dict[GpuUuid, int] = field(default_factory=dict[GpuUuid, int])
    """Counts loads and unloads on each GPU, so that a measurement knows whether it was alone."""

    def nearest(self, key: FootprintKey) -> FootprintKey | None:
        """The load of these weights on as many GPUs, in the same shares and by such a server, that was measured last,
        whatever its context, slots and cache."""
        found = self.latest.get(key.kind)
        return found if found in self.known else None

    def touched(self, gpus: tuple[GpuUuid, ...]) -> None:
        """A load or unload begins or ends there."""
        for gpu in gpus:
            self.changes[gpu] = self.changes.get(gpu, 0) + 1

    def before(
        self, key: FootprintKey, gpus: tuple[GpuUuid, ...], used: Mapping[GpuUuid, int], *, is_certain: bool = True
    ) -> MeasurementStart:
        """To be kept while the load is under way, after `touched` for the load itself."""
        changes = tuple(self.changes.get(g, 0) for g in gpus)
        return MeasurementStart(key, tuple(used.get(g, 0) for g in gpus), changes, is_certain)

    def after(
        self, before: MeasurementStart, reservation: Reservation, used: Mapping[GpuUuid, int], reported_bytes: int
    ) -> tuple[int, ...] | None:
        """What the load holds on each GPU; None where something else changed or it is implausible. It is then known
        as its footprint, unless the server could have shared it out in more than one way.

        `reported_bytes`: what the server says that it holds on the GPUs, CUDA contexts left out: a measurement below
        that has another program's leaving in it, and one far above it and the estimate another's coming.
        """
        gpus = tuple(gpu for gpu, _ in reservation.per_gpu_bytes)
        if before.changes != tuple(self.changes.get(gpu, 0) for gpu in gpus):
            return None
        sizes = tuple(used.get(gpu, 0) - was for gpu, was in zip(gpus, before.used_bytes, strict=True))
        expected = [size for _, size in reservation.per_gpu_bytes]
        total = max(reported_bytes, sum(expected)) if before.is_certain else reported_bytes
        most = _MOST_TOTAL_SHARE * total + _UNTOLD_BYTES * len(sizes)
        if not _TOLD_SHARE * reported_bytes <= sum(sizes) <= most:
            return None
        if not before.is_certain:
            return tuple(max(0, size) for size in sizes) if _is_covered(sizes, expected) else None
        if not is_plausible(sizes, expected):
            return None
        self.remember(before.key, sizes)
        return sizes

    def remember(self, key: FootprintKey, sizes: tuple[int, ...]) -> None:
        put(self.known, key, sizes, _KEPT_MAX)
        self.latest[key.kind] = key


def is_plausible(sizes: Sequence[int], expected: Sequence[int]) -> bool:
    """Whether they are near enough to the estimate to have no other cause."""
    return all(_LEAST_SHARE * e <= size <= _MOST_SHARE * e for size, e in zip(sizes, expected, strict=True))


def _is_covered(sizes: Sequence[int], expected: Sequence[int]) -> bool:
    """Whether no GPU shows more than was expected; less, or nothing, is there where the model is elsewhere."""
    return all(-_UNTOLD_BYTES <= size <= _MOST_SHARE * e for size, e in zip(sizes, expected, strict=True))
