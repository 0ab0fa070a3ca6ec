"""EMULATED GPUs, read as NVML would read real ones.

Shows memory by the allocations of living processes (`router.lab.emulator.vram`), and makes up temperature, power and
utilisation from which of those processes computed of late. Reads only; takes memory from nobody.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from router.domain.gpu import Gpu, GpuProcess, GpuUuid
from router.lab.emulator import vram
from router.lab.emulator.spec import EmulatorSpec

_BUSY_SECONDS = 1.0
"""A process that computed so long ago still counts as busy: one sampling period of NVML."""
_IDLE_CELSIUS, _BUSY_CELSIUS = 34.0, 68.0
_WARMING_SECONDS = 30.0
"""A GPU nears its new temperature by 63 % in this time."""


def write_rig_file(spec: EmulatorSpec, directory: Path) -> None:
    """Puts the GPUs of `spec` into `directory`, all free. Allocations that are there stay."""
    (directory / "vram").mkdir(parents=True, exist_ok=True)
    gpus = [{"uuid": uuid, **dataclasses.asdict(gpu)} for uuid, gpu in zip(spec.uuids, spec.gpus, strict=True)]
    data: dict[str, Any] = {"emulated": True, "gpus": gpus, "version": spec.version, "speed": spec.speed}
    vram.write_json(directory / "rig.json", {**data, "ram_bytes": spec.ram_bytes})


class EmulatedGpuReader:
    """The emulated GPUs of a directory, behind the protocol of the NVML reader."""

    def __init__(
        self,
        directory: Path,
        clock: Callable[[], float] = time.monotonic,
        wall_seconds: Callable[[Path], float | None] | None = None,
    ) -> None:
        """`wall_seconds` tells how long ago a busy file was touched; None if never."""
        self._directory = directory
        self._clock = clock
        self._age = wall_seconds or _age_seconds
        self._warmth: dict[str, tuple[float, float]] = {}

    def read(self) -> tuple[Gpu, ...]:
        """All GPUs as they are now. A lost GPU keeps its place, with its error."""
        uses = vram.uses(self._directory)
        lost = vram.read_json(self._directory / "lost.json")
        external = vram.read_json(self._directory / "foreign.json")
        gpus: list[dict[str, Any]] = vram.read_json(self._directory / "rig.json").get("gpus", [])
        return tuple(
            self._gpu(index, gpu, uses, external.get(gpu["uuid"], 0), gpu["uuid"] in lost)
            for index, gpu in enumerate(gpus)
        )

    def close(self) -> None:
        """Nothing is held open."""

    def _gpu(self, index: int, gpu: dict[str, Any], uses: list[vram.Use], external: int, is_lost: bool) -> Gpu:
        uuid: str = gpu["uuid"]
        on_gpu = [use for use in uses if uuid in use.bytes_by_gpu]
        used = sum(use.bytes_by_gpu[uuid] for use in on_gpu) + external
        usable = gpu["memory_total_bytes"] - gpu["memory_reserved_bytes"]
        busy = any((age := self._age(use.is_busy_path)) is not None and age < _BUSY_SECONDS for use in on_gpu)
        warmth = self._warm(uuid, 1.0 if busy else 0.0)
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
            pcie_generation_max=gpu["pcie_generation"],
            pcie_width=gpu["pcie_width"],
            pcie_width_max=gpu["pcie_width"],
            temperature_celsius=round(_IDLE_CELSIUS + (_BUSY_CELSIUS - _IDLE_CELSIUS) * warmth),
            power_draw_watts=round(limit * (0.85 if busy else 0.06 + 0.04 * bool(on_gpu)), 1),
            power_limit_watts=limit,
            utilization_ratio=0.95 if busy else 0.0,
            memory_bus_width_bits=gpu["memory_bus_width_bits"],
            memory_clock_hertz=gpu["memory_clock_hertz"],
            processes=tuple(GpuProcess(use.pid, use.bytes_by_gpu[uuid]) for use in on_gpu),
            error="GPU is lost" if is_lost else None,
        )

    def _warm(self, uuid: str, goal: float) -> float:
        """How warm the GPU is between idle (0) and long busy (1)."""
        now = self._clock()
        warmth, since = self._warmth.get(uuid, (0.0, now))
        share = min(1.0, (now - since) / _WARMING_SECONDS)
        warmth += (goal - warmth) * share
        self._warmth[uuid] = (warmth, now)
        return warmth


def _age_seconds(path: Path) -> float | None:
    """Seconds since the file was touched; both ends on the system's monotonic clock, written into the file."""
    try:
        return time.monotonic() - float(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
