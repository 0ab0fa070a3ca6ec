"""The simulated GPUs: who holds how many bytes where, what they look like to NVML, and how long they were busy.

An allocation is made on all its GPUs or on none. It knows no server and makes no decision.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from router.domain.gpu import Gpu, GpuUuid
from router.lab.simulator.world import GpuModel


@dataclass(frozen=True, slots=True)
class SimGpu:
    """One GPU as it was built."""

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
    def facts(self) -> GpuModel:
        bandwidth = 2.0 * self.memory_clock_hertz * self.memory_bus_width_bits / 8
        return GpuModel(bandwidth, self.fp32_teraflops)


class OutOfMemoryError(Exception):
    """A GPU has no room for an allocation; nothing was taken on any GPU."""


class GpuLedger:
    """Memory and busy time of all GPUs of a rig."""

    def __init__(self, gpus: tuple[SimGpu, ...]) -> None:
        self.gpus = gpus
        self.by_uuid = {gpu.uuid: gpu for gpu in gpus}
        self.external_bytes: dict[GpuUuid, int] = dict.fromkeys(self.by_uuid, 0)
        self.lost: set[GpuUuid] = set()
        self.slowdown_by_gpu: dict[GpuUuid, float] = {}
        """By how much a hot GPU takes longer."""
        self.out_of_memory = 0
        self._held: dict[GpuUuid, dict[int, int]] = {gpu.uuid: {} for gpu in gpus}
        self._used: dict[GpuUuid, int] = dict.fromkeys(self.by_uuid, 0)
        self._working: dict[GpuUuid, int] = dict.fromkeys(self.by_uuid, 0)
        self._busy_since: dict[GpuUuid, float] = {}
        self._busy_seconds: dict[GpuUuid, float] = dict.fromkeys(self.by_uuid, 0.0)

    def free_bytes(self, uuid: GpuUuid) -> int:
        """What the driver calls free; a lost GPU has nothing."""
        if uuid in self.lost:
            return 0
        return max(0, self.by_uuid[uuid].usable_bytes - self._used[uuid] - self.external_bytes[uuid])

    def used_bytes(self, uuid: GpuUuid) -> int:
        return self._used[uuid] + self.external_bytes[uuid]

    def allocate(self, owner: int, wanted: Mapping[GpuUuid, int]) -> None:
        """Gives the owner these bytes on top of nothing. Raises OutOfMemoryError."""
        for uuid, size in wanted.items():
            if size > self.free_bytes(uuid):
                self.out_of_memory += uuid not in self.lost
                raise OutOfMemoryError(f"GPU {self.by_uuid[uuid].index}: {size} bytes wanted")
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

    def slowdown_factor(self, uuids: tuple[GpuUuid, ...]) -> float:
        return max((self.slowdown_by_gpu.get(uuid, 1.0) for uuid in uuids), default=1.0)

    def read(self) -> tuple[Gpu, ...]:
        """All GPUs as NVML would show them now. A lost GPU keeps its place, with its error."""
        return tuple(self._gpu(gpu) for gpu in self.gpus)

    def _gpu(self, gpu: SimGpu) -> Gpu:
        busy = self._working[gpu.uuid] > 0
        return Gpu(
            uuid=gpu.uuid,
            index=gpu.index,
            name=gpu.name,
            memory_total_bytes=gpu.memory_total_bytes,
            memory_free_bytes=max(0, gpu.usable_bytes - self.used_bytes(gpu.uuid)),
            memory_used_bytes=self.used_bytes(gpu.uuid),
            memory_reserved_bytes=gpu.memory_reserved_bytes,
            compute_capability=gpu.compute_capability,
            pcie_generation=gpu.pcie_generation,
            pcie_generation_max=gpu.pcie_generation,
            pcie_width=gpu.pcie_width,
            pcie_width_max=gpu.pcie_width,
            temperature_celsius=88 if gpu.uuid in self.slowdown_by_gpu else 68 if busy else 36,
            utilization_ratio=0.95 if busy else 0.0,
            memory_bus_width_bits=gpu.memory_bus_width_bits,
            memory_clock_hertz=gpu.memory_clock_hertz,
            error="GPU is lost" if gpu.uuid in self.lost else None,
        )
