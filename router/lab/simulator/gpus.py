"""Simulated GPUs: memory allocations, busy time and the readings that NVML would give.

An allocation succeeds on all its GPUs or on none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from router.domain.gpu import Gpu, GpuUuid
from router.lab.simulator.world import GpuModel


@dataclass(frozen=True, slots=True)
class SimGpu:
    """Hardware properties of one GPU."""

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
        return GpuModel(bandwidth, self.fp32_teraflops, self.compute_capability)


class OutOfMemoryError(Exception):
    """A GPU lacks memory for an allocation; nothing was allocated on any GPU."""


class GpuLedger:
    """Memory allocations and busy time of all GPUs of a machine."""

    def __init__(self, gpus: tuple[SimGpu, ...]) -> None:
        self.gpus = gpus
        self.by_uuid = {gpu.uuid: gpu for gpu in gpus}
        self.external_bytes: dict[GpuUuid, int] = dict.fromkeys(self.by_uuid, 0)
        self.lost: set[GpuUuid] = set()
        self.slowdown_by_gpu: dict[GpuUuid, float] = {}
        """Throttled GPU -> factor by which its work takes longer."""
        self.out_of_memory = 0
        self._held: dict[GpuUuid, dict[int, int]] = {gpu.uuid: {} for gpu in gpus}
        self._used: dict[GpuUuid, int] = dict.fromkeys(self.by_uuid, 0)
        self._working: dict[GpuUuid, int] = dict.fromkeys(self.by_uuid, 0)
        self._busy_since: dict[GpuUuid, float] = {}
        self._busy_seconds: dict[GpuUuid, float] = dict.fromkeys(self.by_uuid, 0.0)

    def free_bytes(self, uuid: GpuUuid) -> int:
        """Free bytes as the driver reports them; 0 for a lost GPU."""
        if uuid in self.lost:
            return 0
        return max(0, self.by_uuid[uuid].usable_bytes - self._used[uuid] - self.external_bytes[uuid])

    def used_bytes(self, uuid: GpuUuid) -> int:
        return self._used[uuid] + self.external_bytes[uuid]

    def allocate(self, allocation_id: int, bytes_by_gpu: Mapping[GpuUuid, int]) -> None:
        """Allocates these bytes under a new id.

        Raises:
            OutOfMemoryError: a GPU has too little free memory; nothing is allocated.
        """
        for uuid, size in bytes_by_gpu.items():
            if size > self.free_bytes(uuid):
                self.out_of_memory += uuid not in self.lost
                raise OutOfMemoryError(f"GPU {self.by_uuid[uuid].index}: {size} bytes requested")
        for uuid, size in bytes_by_gpu.items():
            if size > 0:
                self._held[uuid][allocation_id] = size
                self._used[uuid] += size

    def release(self, allocation_id: int) -> None:
        """Frees the allocation on all GPUs; an unknown id is ignored."""
        for uuid, holders in self._held.items():
            self._used[uuid] -= holders.pop(allocation_id, 0)

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
        busy_since = self._busy_since.get(uuid)
        return self._busy_seconds[uuid] + (now - busy_since if busy_since is not None else 0.0)

    def slowdown_factor(self, uuids: tuple[GpuUuid, ...]) -> float:
        return max((self.slowdown_by_gpu.get(uuid, 1.0) for uuid in uuids), default=1.0)

    def read(self) -> tuple[Gpu, ...]:
        """All GPUs as NVML would report them now. A lost GPU is listed with an error."""
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
