"""Reads EMULATED GPUs through the interface of the NVML reader.

Used memory is the allocations of living processes (`router.lab.emulator.vram`). Temperature, power and utilisation are
made up from which of those processes computed recently. Read-only.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from router.domain.gpu import Gpu, GpuProcess, GpuUuid
from router.lab.emulator import vram
from router.lab.emulator.faults import Fault, read_faults
from router.lab.emulator.spec import EmulatorSpec

_BUSY_SECONDS = 1.0
"""A process counts as busy for this long after it computed: one NVML sampling period."""
_IDLE_CELSIUS, _BUSY_CELSIUS = 34.0, 68.0
_WARMING_SECONDS = 30.0
"""Time scale on which a GPU approaches its new temperature."""


def write_rig_file(spec: EmulatorSpec, directory: Path) -> None:
    """Writes the GPUs of `spec` to `rig.json` in `directory`. Existing allocations stay."""
    (directory / "vram").mkdir(parents=True, exist_ok=True)
    gpus = [{"uuid": uuid, **dataclasses.asdict(gpu)} for uuid, gpu in zip(spec.uuids, spec.gpus, strict=True)]
    data: dict[str, Any] = {"emulated": True, "gpus": gpus, "version": spec.version, "speed": spec.speed}
    data |= {"ram_bytes": spec.ram_bytes, "cold_bytes_per_second": spec.cold_bytes_per_second}
    vram.write_json(directory / "rig.json", {**data, "deviation": spec.deviation, "seed": spec.seed})


class EmulatedGpuReader:
    """Emulated GPUs of a directory; implements the protocol of the NVML reader."""

    def __init__(
        self,
        directory: Path,
        clock: Callable[[], float] = time.monotonic,
        busy_age: Callable[[Path], float | None] | None = None,
    ) -> None:
        """`busy_age` returns the seconds since a busy file was written; None if never."""
        self._directory = directory
        self._clock = clock
        self._busy_age = busy_age or _age_seconds
        self._warmth: dict[str, tuple[float, float]] = {}
        self._xids: dict[str, set[int]] = {}
        """XIDs that were reported already."""

    def read(self) -> tuple[Gpu, ...]:
        """Current state of all GPUs. A lost GPU keeps its index and has `error` set."""
        allocations = vram.allocations(self._directory)
        lost_gpus = vram.lost_gpus(self._directory)
        external_bytes = vram.external_bytes(self._directory)
        gpus: list[dict[str, Any]] = vram.read_json(self._directory / "rig.json").get("gpus", [])
        try:
            faults = read_faults(self._directory)
        except ValueError:
            faults = ()  # the servers log what is wrong with it
        return tuple(
            self._with_faults(
                self._gpu(index, gpu, allocations, external_bytes.get(gpu["uuid"], 0), gpu["uuid"] in lost_gpus), faults
            )
            for index, gpu in enumerate(gpus)
        )

    def _with_faults(self, gpu: Gpu, faults: Iterable[Fault]) -> Gpu:
        """With what the rules of `faults.json` say of it. An XID is reported when its rule appears."""
        rules = [rule for rule in faults if rule.gpu is not None and gpu.uuid.startswith(rule.gpu)]
        xids = {rule.xid for rule in rules if rule.xid is not None}
        reported, self._xids[gpu.uuid] = self._xids.get(gpu.uuid, set()), xids
        celsius = [rule.temperature_celsius for rule in rules if rule.temperature_celsius is not None]
        return dataclasses.replace(
            gpu,
            temperature_celsius=max(celsius, default=gpu.temperature_celsius),
            throttle_reasons=tuple(rule.throttle for rule in rules if rule.throttle is not None),
            ecc_errors_uncorrected=sum(rule.ecc_errors or 0 for rule in rules),
            xids=tuple(sorted(xids - reported)),
        )

    def close(self) -> None:
        """Nothing is held open."""

    def _gpu(
        self, index: int, gpu: dict[str, Any], allocations: list[vram.Allocation], external_bytes: int, is_lost: bool
    ) -> Gpu:
        uuid: str = gpu["uuid"]
        on_gpu = [allocation for allocation in allocations if uuid in allocation.bytes_by_gpu]
        used = sum(allocation.bytes_by_gpu[uuid] for allocation in on_gpu) + external_bytes
        usable = gpu["memory_total_bytes"] - gpu["memory_reserved_bytes"]
        busy = any(
            (age := self._busy_age(allocation.busy_path)) is not None and age < _BUSY_SECONDS for allocation in on_gpu
        )
        warmth = self._update_warmth(uuid, 1.0 if busy else 0.0)
        limit = gpu["power_limit_watts"]
        return Gpu(
            uuid=GpuUuid(uuid),
            index=index,
            name=gpu["name"],
            memory_total_bytes=gpu["memory_total_bytes"],
            memory_free_bytes=max(0, usable - used),
            memory_used_bytes=used,
            memory_reserved_bytes=gpu["memory_reserved_bytes"],
            compute_capability=(gpu["compute_capability"][0], gpu["compute_capability"][1]),
            pcie_generation=gpu["pcie_generation"] if busy else 1,
            pcie_generation_max=gpu.get("pcie_generation_max") or gpu["pcie_generation"],
            pcie_width=gpu["pcie_width"],
            pcie_width_max=gpu.get("pcie_width_max") or gpu["pcie_width"],
            temperature_celsius=_celsius(gpu, warmth),
            power_draw_watts=round(limit * (0.85 if busy else 0.06 + 0.04 * bool(on_gpu)), 1),
            power_limit_watts=limit,
            utilization_ratio=0.95 if busy else 0.0,
            memory_bus_width_bits=gpu["memory_bus_width_bits"],
            memory_clock_hertz=gpu["memory_clock_hertz"],
            processes=tuple(GpuProcess(allocation.pid, allocation.bytes_by_gpu[uuid]) for allocation in on_gpu),
            error="GPU is lost" if is_lost else None,
        )

    def _update_warmth(self, uuid: str, target: float) -> float:
        """Current warmth of the GPU between idle (0) and busy for long (1)."""
        now = self._clock()
        warmth, updated_at = self._warmth.get(uuid, (0.0, now))
        approach = min(1.0, (now - updated_at) / _WARMING_SECONDS)
        warmth += (target - warmth) * approach
        self._warmth[uuid] = (warmth, now)
        return warmth


def _celsius(gpu: dict[str, Any], warmth: float) -> int:
    constant: int | None = gpu.get("temperature_celsius")
    return round(_IDLE_CELSIUS + (_BUSY_CELSIUS - _IDLE_CELSIUS) * warmth) if constant is None else constant


def _age_seconds(path: Path) -> float | None:
    """Seconds since the monotonic time stored in the file."""
    try:
        return time.monotonic() - float(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
