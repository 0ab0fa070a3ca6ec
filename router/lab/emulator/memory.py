"""Free memory as the EMULATED server sees it: of its GPUs and of the host, and which weights are in the page cache.

As in real Ollama, this view can be wrong: up to 0.24 a server uses its own accounting if that shows less free memory
than the driver; from 0.30 it does not query a GPU again while it has a runner on it. Limitation: a server does not see
the host memory used by models of its sibling servers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

from router.lab.emulator import vram
from router.lab.emulator.config import Config
from router.lab.emulator.loaded_model import LoadedModel
from router.lab.simulator.server_placement import VisibleGpu

_CACHE = "pagecache.json"
_CACHED_SHARE = 0.8
"""Share of host memory available to the page cache."""


class Memory:
    """Memory as one server sees it."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._last_free_bytes: dict[str, int] = {}

    def rooms(self, loaded: Iterable[LoadedModel]) -> list[VisibleGpu]:
        """Total and free memory of each visible GPU, in order."""
        own_bytes: dict[str, int] = {}
        for model in loaded:
            accounted = model.bytes_by_gpu if self._config.is_0_30 else model.believed_by_gpu
            for uuid, amount in accounted.items():
                own_bytes[uuid] = own_bytes.get(uuid, 0) + amount
        directory = self._config.emulator_dir
        driver_free_bytes = vram.free_bytes(directory) if directory is not None else {}
        return [
            VisibleGpu(
                gpu.memory_total_bytes,
                self._free(gpu.uuid, gpu.memory_total_bytes, driver_free_bytes, own_bytes),
                gpu.bandwidth_bytes_per_second,
            )
            for gpu in self._config.gpus
        ]

    def _free(self, uuid: str, total: int, driver_free_bytes: dict[str, int], own_bytes: dict[str, int]) -> int:
        used = own_bytes.get(uuid, 0)
        if self._config.is_0_30:
            if used == 0:
                self._last_free_bytes[uuid] = driver_free_bytes.get(uuid, 0)
            return max(0, self._last_free_bytes.get(uuid, 0) - used)
        return max(0, min(driver_free_bytes.get(uuid, 0), total - used))

    def host_free_bytes(self, loaded: Iterable[LoadedModel]) -> int:
        """The emulated host memory minus what this server's models use, or the free memory of the real machine."""
        if self._config.ram_bytes is not None:
            return max(0, self._config.ram_bytes - sum(model.host_bytes for model in loaded))
        info = meminfo()
        return info.get("MemAvailable", 0) + info.get("SwapFree", 0)

    def host_total_bytes(self) -> int:
        return self._config.ram_bytes or meminfo().get("MemTotal", 0)

    def is_cached(self, digest: str, size_bytes: int) -> bool:
        """Whether the weights were in the page cache. Afterwards they are, and least recently read files are evicted.

        Without emulated GPUs every file counts as cached: the tests' files have just been written.
        """
        directory = self._config.emulator_dir
        if directory is None or self._config.ram_bytes is None:
            return True
        cached = {key: int(size) for key, size in vram.read_json(directory / _CACHE).items()}
        was_cached = cached.pop(digest, None) is not None
        cached[digest] = size_bytes
        while len(cached) > 1 and sum(cached.values()) > _CACHED_SHARE * self._config.ram_bytes:
            del cached[next(iter(cached))]
        with contextlib.suppress(OSError):
            vram.write_json(directory / _CACHE, cached)
        return was_cached


def meminfo() -> dict[str, int]:
    """Bytes by name, from proc(5)."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    return {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
