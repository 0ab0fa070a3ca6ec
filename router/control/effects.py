"""Carries out what the controller asks for: loads, unloads, instances on demand, GPU readings.

Only joins the parts that do the work; a load or unload goes to the engine of its model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from router.domain.actions import Load, Unload
from router.domain.events import LoadFailed, LoadFinished, UnloadFinished
from router.domain.footprint import MeasuredFootprint
from router.domain.instance import InstanceName, InstanceSpec
from router.engines.base import Loader


class Effects:
    """Satisfies the controller's `InstanceDriver`. All callables that it is given return at once."""

    def __init__(
        self,
        loaders: Mapping[str, Loader],
        start: Callable[[InstanceSpec], None],
        stop: Callable[[InstanceName], None],
        restart: Callable[[InstanceName, str], None],
        read_gpus: Callable[[], None],
        remember: Callable[[MeasuredFootprint], None],
    ) -> None:
        """`loaders`: by the kind of the model's engine."""
        self._loaders = loaders
        self._start = start
        self._stop = stop
        self._restart = restart
        self._read_gpus = read_gpus
        self._remember = remember

    def start_instance(self, spec: InstanceSpec) -> None:
        self._start(spec)

    def stop_instance(self, name: InstanceName) -> None:
        self._stop(name)

    def restart_instance(self, name: InstanceName, reason: str) -> None:
        self._restart(name, reason)

    def remember(self, footprint: MeasuredFootprint) -> None:
        self._remember(footprint)

    def read_gpus(self) -> None:
        self._read_gpus()

    async def load(self, load: Load) -> LoadFinished | LoadFailed:
        return await self._loaders[load.model.engine].load(load)

    async def unload(self, unload: Unload) -> UnloadFinished:
        return await self._loaders[unload.model.engine].unload(unload)
