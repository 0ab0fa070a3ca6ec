"""Memory as the EMULATED server knows it: free bytes of its GPUs and of the host, and which weights are cached.

What a server believes differs from the truth on purpose: up to 0.24 it trusts its own books over the driver where they
say less; from 0.30 it does not read a GPU again on which it has a runner. Kinder than the truth: a server does not see
the host memory that its siblings' models take.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

from router.lab.emulator import vram
from router.lab.emulator.config import Config
from router.lab.emulator.loaded_model import Loaded
from router.lab.simulator.server_placement import Room

_CACHE = "pagecache.json"
_CACHED_SHARE = 0.8
"""So much of the host's memory holds files that were read."""


class Memory:
    """One server's view."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._seen: dict[str, int] = {}

    def rooms(self, loaded: Iterable[Loaded]) -> list[Room]:
        """Each visible GPU, in order."""
        own: dict[str, int] = {}
        for one in loaded:
            books = one.bytes_by_gpu if self._config.is_0_30 else one.believed_by_gpu
            for uuid, amount in books.items():
                own[uuid] = own.get(uuid, 0) + amount
        directory = self._config.rig_dir
        actual = vram.free_bytes(directory) if directory is not None else {}
        return [
            Room(gpu.memory_total_bytes, self._free(gpu.uuid, gpu.memory_total_bytes, actual, own),
                 gpu.bandwidth_bytes_per_second)
            for gpu in self._config.gpus
        ]  # fmt: skip

    def _free(self, uuid: str, total: int, actual: dict[str, int], own: dict[str, int]) -> int:
        used = own.get(uuid, 0)
        if self._config.is_0_30:
            if used == 0:
                self._seen[uuid] = actual.get(uuid, 0)
            return max(0, self._seen.get(uuid, 0) - used)
        return max(0, min(actual.get(uuid, 0), total - used))

    def host_free_bytes(self, loaded: Iterable[Loaded]) -> int:
        """The rig's host memory less what this server's models hold of it, or what this machine has free."""
        if self._config.ram_bytes is not None:
            return max(0, self._config.ram_bytes - sum(one.host_bytes for one in loaded))
        info = meminfo()
        return info.get("MemAvailable", 0) + info.get("SwapFree", 0)

    def host_total_bytes(self) -> int:
        return self._config.ram_bytes or meminfo().get("MemTotal", 0)

    def is_cached(self, digest: str, size_bytes: int) -> bool:
        """Whether weights lie in the host's page cache; afterwards they do, and the longest unread ones make room.

        Without a rig every file counts as cached: the tests' files have just been written.
        """
        directory = self._config.rig_dir
        if directory is None or self._config.ram_bytes is None:
            return True
        cached = {key: int(size) for key, size in vram.read_json(directory / _CACHE).items()}
        was_there = cached.pop(digest, None) is not None
        cached[digest] = size_bytes
        while len(cached) > 1 and sum(cached.values()) > _CACHED_SHARE * self._config.ram_bytes:
            del cached[next(iter(cached))]
        with contextlib.suppress(OSError):
            vram.write_json(directory / _CACHE, cached)
        return was_there


def meminfo() -> dict[str, int]:
    """Bytes by name, from proc(5)."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    return {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
