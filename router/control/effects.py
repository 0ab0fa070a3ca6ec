"""Carries out all that the engine asks of the fleet: loads and unloads, instances on demand, readings of the GPUs.

It only joins the parts that do these things, so that the engine knows one of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from router.domain.actions import Load, Unload
from router.domain.events import LoadFailed, LoadFinished, UnloadFinished
from router.domain.footprint import FootprintKey
from router.domain.instance import InstanceName, InstanceSpec


class Loader(Protocol):
    async def load(self, load: Load) -> LoadFinished | LoadFailed: ...

    async def unload(self, unload: Unload) -> UnloadFinished: ...


class Effects:
    """Satisfies the engine's `InstanceDriver`. What it is given returns at once, but for the loader."""

    def __init__(
        self,
        loader: Loader,
        start: Callable[[InstanceSpec], None],
        stop: Callable[[InstanceName], None],
        read_gpus: Callable[[], None],
        remember: Callable[[FootprintKey, tuple[int, ...]], None],
    ) -> None:
        self._loader = loader
        self._start = start
        self._stop = stop
        self._read_gpus = read_gpus
        self._remember = remember

    def start_instance(self, spec: InstanceSpec) -> None:
        self._start(spec)

    def stop_instance(self, name: InstanceName) -> None:
        self._stop(name)

    def remember(self, key: FootprintKey, per_gpu_bytes: tuple[int, ...]) -> None:
        self._remember(key, per_gpu_bytes)

    def read_gpus(self) -> None:
        self._read_gpus()

    async def load(self, load: Load) -> LoadFinished | LoadFailed:
        return await self._loader.load(load)

    async def unload(self, unload: Unload) -> UnloadFinished:
        return await self._loader.unload(unload)
