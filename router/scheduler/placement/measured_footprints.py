"""Footprints that loads have shown: bytes on each GPU of a set, which replace the estimate for the next such load.

Sources, best first: the server's own output, which tells the bytes of one load by part whatever else moves on the GPU
(`LoadMeasured`); the GPUs' readings before and after a load that was alone on them. A reading far from the estimate may
have another program's memory in it: it is believed when the next such load shows it again. A footprint belongs to the
weights, the number of GPUs and their shares, the context, the slots, the type of the cache, flash attention and the
server's version. Reads no GPU: readings are passed in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from router.domain.footprint import FootprintKey, FootprintKind, GpuFootprint, MeasuredFootprint
from router.domain.gpu import GpuUuid
from router.domain.model import BlobDigest
from router.domain.reservation import Reservation
from router.scheduler.lru import put

_PLAUSIBLE_MIN, _PLAUSIBLE_MAX = 0.5, 1.5
"""Ratios of the estimate beyond which a reading has to repeat before it is believed."""
_REPEATS_WITHIN = 0.03
"""Two readings of the same load differ by no more than this ratio, or by `_REPEATS_WITHIN_BYTES`."""
_REPEATS_WITHIN_BYTES = 128 * 1024**2
_REPORTED_MIN, _TOTAL_MAX = 0.97, 1.1
_UNREPORTED_BYTES = 1024**3
"""Per GPU, on top: the CUDA context and what the driver rounds up."""
_CONTEXT_BYTES_MIN, _CONTEXT_BYTES_MAX = 200 * 1024**2, 1024**3
"""A CUDA context, as the difference between a GPU's reading and the server's report, is between these."""
_KEPT_MAX = 4096
RAISE_RATIO = 1.16
"""By how much the estimate of weights is raised whose load failed for memory: one model in many takes 15 % more."""


@dataclass(frozen=True, slots=True)
class MeasurementStart:
    """The GPUs of a load when it was sent."""

    key: FootprintKey
    used_bytes: tuple[int, ...]
    changes: tuple[int, ...]
    is_certain: bool = True
    """Whether it was known how the server shares the model out: else more is reserved than it takes in all."""
    is_alone: bool = True
    """Whether no other load was under way on these GPUs."""


@dataclass(slots=True)
class Footprints:
    """What was measured, and what is being measured."""

    known: dict[FootprintKey, MeasuredFootprint] = field(default_factory=dict[FootprintKey, MeasuredFootprint])
    latest: dict[FootprintKind, FootprintKey] = field(default_factory=dict["FootprintKind", FootprintKey])
    """The last measurement, by all but context, slots and cache."""
    by_parts: dict[tuple[BlobDigest, str], FootprintKey] = field(
        default_factory=dict[tuple[BlobDigest, str], FootprintKey]
    )
    """The last measurement that tells parts, by weights and server version: it carries to every other load of them."""
    doubted: dict[FootprintKey, tuple[int, ...]] = field(default_factory=dict[FootprintKey, tuple[int, ...]])
    """Readings far from the estimate, until they repeat."""
    raised_at: dict[BlobDigest, float] = field(default_factory=dict[BlobDigest, float])
    """When a load of these weights failed for memory; their estimate is raised until a load is measured."""
    changes: dict[GpuUuid, int] = field(default_factory=dict[GpuUuid, int])
    """Counts loads and unloads on each GPU, so that a measurement knows whether it was alone."""
    _revisions: dict[BlobDigest, int] = field(default_factory=dict[BlobDigest, int])

    def nearest(self, key: FootprintKey) -> FootprintKey | None:
        """The last measured load of these weights on as many GPUs, in the same shares and by such a server, with any
        context, slots and cache type."""
        found = self.latest.get(key.kind)
        return found if found in self.known else None

    def with_parts(self, key: FootprintKey) -> MeasuredFootprint | None:
        """The last load of these weights by such a server whose parts are known, on any number of GPUs."""
        found = self.by_parts.get((key.blob, key.version))
        return None if found is None else self.known.get(found)

    def revision(self, blob: BlobDigest) -> int:
        """Grows with everything that changes a prediction for these weights."""
        return self._revisions.get(blob, 0)

    def _changed(self, blob: BlobDigest) -> None:
        self._revisions[blob] = self._revisions.get(blob, 0) + 1

    def raise_estimate(self, blob: BlobDigest, now: float) -> bool:
        """After a load that failed for memory. Returns False where the estimate was raised already."""
        if blob in self.raised_at:
            return False
        self.raised_at[blob] = now
        self._changed(blob)
        return True

    def forget_raised(self, horizon: float) -> bool:
        """Drops raised estimates from before `horizon`, in seconds. Returns whether there were any."""
        kept = {blob: at for blob, at in self.raised_at.items() if at > horizon}
        dropped = self.raised_at.keys() - kept.keys()
        self.raised_at = kept
        for blob in dropped:
            self._changed(blob)
        return bool(dropped)

    def touched(self, gpus: tuple[GpuUuid, ...]) -> None:
        """A load or unload begins or ends there."""
        for gpu in gpus:
            self.changes[gpu] = self.changes.get(gpu, 0) + 1

    def before(
        self,
        key: FootprintKey,
        gpus: tuple[GpuUuid, ...],
        used: Mapping[GpuUuid, int],
        *,
        is_certain: bool = True,
        is_alone: bool = True,
    ) -> MeasurementStart:
        """To be kept while the load is under way, after `touched` for the load itself."""
        changes = tuple(self.changes.get(g, 0) for g in gpus)
        return MeasurementStart(key, tuple(used.get(g, 0) for g in gpus), changes, is_certain, is_alone)

    def after(
        self,
        before: MeasurementStart,
        reservation: Reservation,
        used: Mapping[GpuUuid, int],
        reported_bytes: int,
        parts: Sequence[GpuFootprint] = (),
        context_bytes: int = 0,
    ) -> MeasuredFootprint | None:
        """What the load holds on each GPU; None where that cannot be told. It is then remembered as its footprint,
        unless the server could have shared it out in more than one way.

        `reported_bytes`: what the server lists as on the GPUs, CUDA contexts left out; 0 where it lists none. `parts`:
        what its output said, by GPU. `context_bytes`: a CUDA context as estimated, where the readings cannot tell it.
        """
        gpus = tuple(gpu for gpu, _ in reservation.per_gpu_bytes)
        is_alone = before.is_alone and before.changes == tuple(self.changes.get(gpu, 0) for gpu in gpus)
        sizes = tuple(used.get(gpu, 0) - was for gpu, was in zip(gpus, before.used_bytes, strict=True))
        if len(parts) == len(gpus) and any(part.total_bytes for part in parts):
            found = _with_contexts(before.key, parts, sizes if is_alone else (), context_bytes)
        elif not is_alone or not self._is_believed(before, reservation, sizes, reported_bytes):
            return None
        else:
            found = MeasuredFootprint(before.key, tuple(max(0, size) for size in sizes))
        if before.is_certain:
            self.remember(found)
        return found

    def remember(self, found: MeasuredFootprint) -> None:
        self._changed(found.key.blob)
        put(self.known, found.key, found, _KEPT_MAX)
        self.latest[found.key.kind] = found.key
        self.doubted.pop(found.key, None)
        self.raised_at.pop(found.key.blob, None)
        if found.parts:
            put(self.by_parts, (found.key.blob, found.key.version), found.key, _KEPT_MAX)

    def _is_believed(
        self, before: MeasurementStart, reservation: Reservation, sizes: tuple[int, ...], reported_bytes: int
    ) -> bool:
        """Whether the readings are the load's alone: near the estimate, or seen twice.

        A total below what the server reports has another program's leaving in it, one far above both the report and
        the estimate another's coming.
        """
        expected = [size for _, size in reservation.per_gpu_bytes]
        if before.is_certain:
            total = max(reported_bytes, sum(expected))
            is_near = all(
                _PLAUSIBLE_MIN * e <= size <= _PLAUSIBLE_MAX * e for size, e in zip(sizes, expected, strict=True)
            )
        else:
            total = reported_bytes
            is_near = all(
                -_UNREPORTED_BYTES <= size <= _PLAUSIBLE_MAX * e for size, e in zip(sizes, expected, strict=True)
            )
        most = _TOTAL_MAX * total + _UNREPORTED_BYTES * len(sizes)
        if is_near and _REPORTED_MIN * reported_bytes <= sum(sizes) <= most:
            return True
        earlier = self.doubted.get(before.key)
        if earlier is not None and _repeats(earlier, sizes):
            return True
        if before.is_certain and min(sizes, default=0) > 0:
            put(self.doubted, before.key, sizes, _KEPT_MAX)
        return False


def _with_contexts(
    key: FootprintKey, parts: Sequence[GpuFootprint], sizes: tuple[int, ...], context_bytes: int
) -> MeasuredFootprint:
    """The parts with the CUDA contexts: what a reading shows beyond them where it is plausible, else as estimated."""
    found: list[GpuFootprint] = []
    for index, part in enumerate(parts):
        if not part.total_bytes:
            found.append(part)
            continue
        shown = sizes[index] - part.total_bytes if sizes else 0
        is_context = _CONTEXT_BYTES_MIN <= shown <= _CONTEXT_BYTES_MAX
        found.append(replace(part, cuda_context_bytes=shown if is_context else context_bytes))
    return MeasuredFootprint(key, tuple(part.total_bytes for part in found), tuple(found))


def _repeats(earlier: tuple[int, ...], sizes: tuple[int, ...]) -> bool:
    return len(earlier) == len(sizes) and all(
        abs(a - b) <= max(_REPEATS_WITHIN_BYTES, _REPEATS_WITHIN * max(a, b))
        for a, b in zip(earlier, sizes, strict=True)
    )
