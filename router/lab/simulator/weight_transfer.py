"""Weight transfers to the GPUs: concurrent loads share the disk and the host's copy bandwidth.

Each load first takes a runner's fixed start-up time, then transfers its bytes: from the page cache if the whole file is
cached, else from disk. The rates are in `router.lab.simulator.world`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from router.domain.model import BlobDigest
from router.lab.simulator.timeline import Timeline, Timer
from router.lab.simulator.world import World

_ROUNDING_BYTES = 1.0


class PageCache:
    """LRU cache of whole weight files."""

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        self._held: dict[BlobDigest, int] = {}

    def holds(self, blob: BlobDigest) -> bool:
        return blob in self._held

    def read(self, blob: BlobDigest, size: int) -> None:
        """Marks the file as most recently read and evicts the oldest ones."""
        self._held.pop(blob, None)
        self._held[blob] = size
        while sum(self._held.values()) > self._size_bytes:
            del self._held[next(iter(self._held))]

    def forget(self) -> None:
        self._held.clear()


@dataclass(slots=True, eq=False)
class Transfer:
    """One load in progress."""

    blob: BlobDigest
    size_bytes: int
    remaining_bytes: float
    is_warm: bool
    done: Callable[[], None]
    bytes_per_second: float = 0.0


class WeightTransfers:
    """All loads in progress on one machine."""

    def __init__(self, timeline: Timeline, world: World, cache: PageCache) -> None:
        self._timeline = timeline
        self._world = world
        self._cache = cache
        self._active: list[Transfer] = []
        self._advanced_at = 0.0
        self._timer: Timer | None = None
        self.disk_factor = 1.0
        """Below 1 while the disk is slow."""

    def start(self, blob: BlobDigest, size_bytes: int, fixed_seconds: float, done: Callable[[], None]) -> Transfer:
        """Starts a load; `done` is called once all bytes are read, which begins after `fixed_seconds`."""
        transfer = Transfer(blob, size_bytes, float(size_bytes), self._cache.holds(blob), done)
        self._timeline.after(fixed_seconds, lambda: self._begin(transfer))
        return transfer

    def abort(self, transfer: Transfer) -> None:
        """Ends a transfer without calling `done`; the page cache is unchanged."""
        transfer.remaining_bytes = -1.0
        if transfer in self._active:
            self._advance()
            self._active.remove(transfer)
            self._schedule()

    def set_disk_factor(self, factor: float) -> None:
        self._advance()
        self.disk_factor = factor
        self._schedule()

    def _begin(self, transfer: Transfer) -> None:
        if transfer.remaining_bytes < 0:
            return
        self._advance()
        self._active.append(transfer)
        self._schedule()

    def _advance(self) -> None:
        elapsed = self._timeline.now - self._advanced_at
        self._advanced_at = self._timeline.now
        for transfer in self._active:
            transfer.remaining_bytes -= transfer.bytes_per_second * elapsed

    def _schedule(self) -> None:
        """Divides disk bandwidth among cold loads and host bandwidth among all; sets a timer for the first to end."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._active:
            return
        world = self._world
        cold = sum(not transfer.is_warm for transfer in self._active)
        share = world.host_bytes_per_second / len(self._active)
        for transfer in self._active:
            limit = world.warm_bytes_per_second
            if not transfer.is_warm:
                limit = world.cold_bytes_per_second * self.disk_factor / cold
            transfer.bytes_per_second = min(limit, share)
        first = min(max(0.0, transfer.remaining_bytes) / transfer.bytes_per_second for transfer in self._active)
        self._timer = self._timeline.after(first, self._finish_due)

    def _finish_due(self) -> None:
        self._timer = None
        self._advance()
        ended = [transfer for transfer in self._active if transfer.remaining_bytes <= _ROUNDING_BYTES]
        self._active = [transfer for transfer in self._active if transfer.remaining_bytes > _ROUNDING_BYTES]
        self._schedule()
        for transfer in ended:
            transfer.remaining_bytes = -1.0
            self._cache.read(transfer.blob, transfer.size_bytes)
            transfer.done()
