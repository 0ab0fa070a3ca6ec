"""The simulated cards: who holds how many bytes where, what they look like to NVML, and how long they were busy.

An allocation is made on all its cards or on none. It knows no server and makes no decision.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from router.domain.gpu import Gpu, GpuUuid
from router.lab.simulator.world import CardFacts


@dataclass(frozen=True, slots=True)
class SimCard:
    """One card as it was built."""

    uuid: GpuUuid
    index: int
    name: str
    memory_total_bytes: int
    memory_reserved_bytes: int
    memory_bus_width_bits: int
    memory_clock_hertz: int
    fp32_teraflops: float
    compute_capability: tuple[int, int] = (8, 6)
    pcie_generation: int = 4
    pcie_width: int = 16

    @property
    def usable_bytes(self) -> int:
        return self.memory_total_bytes - self.memory_reserved_bytes

    @property
    def facts(self) -> CardFacts:
        bandwidth = 2.0 * self.memory_clock_hertz * self.memory_bus_width_bits / 8
        return CardFacts(bandwidth, self.fp32_teraflops)


class OutOfMemoryError(Exception):
    """A card has no room for an allocation; nothing was taken on any card."""


class CardBook:
    """Memory and busy time of all cards of a rig."""

    def __init__(self, cards: tuple[SimCard, ...]) -> None:
        self.cards = cards
        self.by_uuid = {card.uuid: card for card in cards}
        self.foreign_bytes: dict[GpuUuid, int] = dict.fromkeys(self.by_uuid, 0)
        self.lost: set[GpuUuid] = set()
        self.slow: dict[GpuUuid, float] = {}
        """By how much a hot card takes longer."""
        self.out_of_memory = 0
        self._held: dict[GpuUuid, dict[int, int]] = {card.uuid: {} for card in cards}
        self._used: dict[GpuUuid, int] = dict.fromkeys(self.by_uuid, 0)
        self._working: dict[GpuUuid, int] = dict.fromkeys(self.by_uuid, 0)
        self._busy_since: dict[GpuUuid, float] = {}
        self._busy_seconds: dict[GpuUuid, float] = dict.fromkeys(self.by_uuid, 0.0)

    def free_bytes(self, uuid: GpuUuid) -> int:
        """What the driver calls free; a lost card has nothing."""
        if uuid in self.lost:
            return 0
        return max(0, self.by_uuid[uuid].usable_bytes - self._used[uuid] - self.foreign_bytes[uuid])

    def used_bytes(self, uuid: GpuUuid) -> int:
        return self._used[uuid] + self.foreign_bytes[uuid]

    def allocate(self, owner: int, wanted: Mapping[GpuUuid, int]) -> None:
        """Gives the owner these bytes on top of nothing. Raises OutOfMemoryError."""
        for uuid, size in wanted.items():
            if size > self.free_bytes(uuid):
                self.out_of_memory += uuid not in self.lost
                raise OutOfMemoryError(f"card {self.by_uuid[uuid].index}: {size} bytes wanted")
        for uuid, size in wanted.items():
            if size > 0:
                self._held[uuid][owner] = size
                self._used[uuid] += size

    def release(self, owner: int) -> None:
        """Takes back all that the owner holds; nothing where it holds nothing."""
        for uuid, holders in self._held.items():
            self._used[uuid] -= holders.pop(owner, 0)

    def work_began(self, uuids: tuple[GpuUuid, ...], now: float) -> None:
        for uuid in uuids:
            self._working[uuid] += 1
            if self._working[uuid] == 1:
                self._busy_since[uuid] = now

    def work_ended(self, uuids: tuple[GpuUuid, ...], now: float) -> None:
        for uuid in uuids:
            self._working[uuid] -= 1
            if self._working[uuid] == 0:
                self._busy_seconds[uuid] += now - self._busy_since.pop(uuid)

    def busy_seconds(self, uuid: GpuUuid, now: float) -> float:
        since = self._busy_since.get(uuid)
        return self._busy_seconds[uuid] + (now - since if since is not None else 0.0)

    def slowness(self, uuids: tuple[GpuUuid, ...]) -> float:
        return max((self.slow.get(uuid, 1.0) for uuid in uuids), default=1.0)

    def read(self) -> tuple[Gpu, ...]:
        """All cards as NVML would show them now. A lost card keeps its place, with its error."""
        return tuple(self._gpu(card) for card in self.cards)

    def _gpu(self, card: SimCard) -> Gpu:
        busy = self._working[card.uuid] > 0
        return Gpu(
            uuid=card.uuid,
            index=card.index,
            name=card.name,
            memory_total_bytes=card.memory_total_bytes,
            memory_free_bytes=max(0, card.usable_bytes - self.used_bytes(card.uuid)),
            memory_used_bytes=self.used_bytes(card.uuid),
            memory_reserved_bytes=card.memory_reserved_bytes,
            compute_capability=card.compute_capability,
            pcie_generation=card.pcie_generation,
            pcie_generation_max=card.pcie_generation,
            pcie_width=card.pcie_width,
            pcie_width_max=card.pcie_width,
            temperature_celsius=88 if card.uuid in self.slow else 68 if busy else 36,
            utilization_ratio=0.95 if busy else 0.0,
            memory_bus_width_bits=card.memory_bus_width_bits,
            memory_clock_hertz=card.memory_clock_hertz,
            error="GPU is lost" if card.uuid in self.lost else None,
        )
