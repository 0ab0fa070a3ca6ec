"""How fast weights come to the GPUs: a page cache, a disk and a host that loads side by side have to share.

Each load first takes the fixed time of a runner's start, then moves its bytes: from the page cache where all of them
are in it, else from the disk. Loads at the same time share the disk, and what the host can copy in all. Figures are
`router.lab.simulator.world`'s; it knows no server and no GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from router.domain.model import BlobDigest
from router.lab.simulator.timeline import Timeline, Timer
from router.lab.simulator.world import World

_ENOUGH_BYTES = 1.0


class PageCache:
    """Whole weights files, the one read longest ago leaving first."""

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        self._held: dict[BlobDigest, int] = {}

    def holds(self, blob: BlobDigest) -> bool:
        return blob in self._held

    def read(self, blob: BlobDigest, size: int) -> None:
        """The file was read: it is the newest now."""
        self._held.pop(blob, None)
        self._held[blob] = size
        while sum(self._held.values()) > self._size_bytes:
            del self._held[next(iter(self._held))]

    def forget(self) -> None:
        self._held.clear()


@dataclass(slots=True, eq=False)
class Transfer:
    """One load under way."""

    blob: BlobDigest
    size_bytes: int
    left_bytes: float
    is_warm: bool
    done: Callable[[], None]
    begun: bool = False
    rate: float = 0.0


class WeightTransfers:
    """All loads under way on one host."""

    def __init__(self, timeline: Timeline, world: World, cache: PageCache) -> None:
        self._timeline = timeline
        self._world = world
        self._cache = cache
        self._moving: list[Transfer] = []
        self._moved_at = 0.0
        self._timer: Timer | None = None
        self.disk_factor = 1.0
        """Below 1 while the disk is slow."""

    def start(self, blob: BlobDigest, size_bytes: int, on_gpus: bool, done: Callable[[], None]) -> Transfer:
        """Begins a load of so many bytes; `done` is called when all are read."""
        transfer = Transfer(blob, size_bytes, float(size_bytes), self._cache.holds(blob), done)
        fixed = self._world.load_fixed_seconds if on_gpus else self._world.load_fixed_cpu_seconds
        self._timeline.after(fixed, lambda: self._begin(transfer))
        return transfer

    def abort(self, transfer: Transfer) -> None:
        """The runner is gone; what it read stays in the cache only if it was there."""
        transfer.left_bytes = -1.0
        if transfer in self._moving:
            self._advance()
            self._moving.remove(transfer)
            self._plan()

    def set_disk_factor(self, factor: float) -> None:
        self._advance()
        self.disk_factor = factor
        self._plan()

    def _begin(self, transfer: Transfer) -> None:
        if transfer.left_bytes < 0:
            return
        self._advance()
        self._moving.append(transfer)
        self._plan()

    def _advance(self) -> None:
        passed = self._timeline.now - self._moved_at
        self._moved_at = self._timeline.now
        for transfer in self._moving:
            transfer.left_bytes -= transfer.rate * passed

    def _plan(self) -> None:
        """Shares the disk among the cold and the host among all, then waits for the first to end."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._moving:
            return
        world = self._world
        cold = sum(not one.is_warm for one in self._moving)
        share = world.host_bytes_per_second / len(self._moving)
        for one in self._moving:
            own = world.warm_bytes_per_second
            if not one.is_warm:
                own = world.cold_bytes_per_second * self.disk_factor / cold
            one.rate = min(own, share)
        first = min(max(0.0, one.left_bytes) / one.rate for one in self._moving)
        self._timer = self._timeline.after(first, self._arrived)

    def _arrived(self) -> None:
        self._timer = None
        self._advance()
        ended = [one for one in self._moving if one.left_bytes <= _ENOUGH_BYTES]
        self._moving = [one for one in self._moving if one.left_bytes > _ENOUGH_BYTES]
        self._plan()
        for one in ended:
            one.left_bytes = -1.0
            self._cache.read(one.blob, one.size_bytes)
            one.done()
