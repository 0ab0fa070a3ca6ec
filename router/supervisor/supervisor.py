"""Keeps all instances in the state that is wanted of them: one task each, started together, stopped together.

Reports every change of state and decides nothing about requests. Ending `run`, however that happens, ends every process
that was started.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import aiohttp
import structlog

from router.domain.events import InstanceChanged
from router.domain.instance import InstanceName, InstanceSpec, InstanceState, InstanceView
from router.engines.ollama.health_probe import Probe, ProbeFailed, version_probe
from router.supervisor.clock import Clock, SystemClock
from router.supervisor.instance import Instance, InstanceContext, SupervisorConfig

__all__ = ["Supervisor", "SupervisorConfig"]

_GONE_SECONDS = 15.0
"""Beyond the polite part of a stop: SIGKILL, and the kernel freeing a big process's memory."""


class Supervisor:
    """Owns the instances. `add` them before or during `run`; all methods belong to `run`'s event loop and thread.

    That thread must be one that lives as long as the servers shall (see `ChildProcess.spawn`): run it in the main one.
    """

    def __init__(
        self, config: SupervisorConfig, on_change: Callable[[InstanceChanged], None], clock: Clock | None = None
    ) -> None:
        self._config = config
        self._instances: dict[InstanceName, Instance] = {}
        self._around = InstanceContext(config, clock or SystemClock(), self._ask_version, on_change)
        self._probe: Probe | None = None
        self._tasks: asyncio.TaskGroup | None = None
        self._running: dict[Instance, asyncio.Task[None]] = {}
        self._retiring: set[Instance] = set()
        self._refused: dict[InstanceName, InstanceSpec] = {}
        self._closing = asyncio.Event()
        self._log = structlog.get_logger("router.fleet")

    # --- running -------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Runs the instances until `stop_all` has stopped them. Cancelled, it kills them."""
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session:
            self._probe = version_probe(session)
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                for instance in self._instances.values():
                    self._begin(instance, tasks)
                await self._closing.wait()
                for task in self._running.values():
                    task.cancel()

    def add(self, spec: InstanceSpec) -> None:
        """Wants one more instance to run. ValueError if there is one of that name.

        One that is retired and has stopped is there no more: whoever is told of its end may ask for the next at once.
        """
        before = self._instances.get(spec.name)
        if before is not None and not (before in self._retiring and before.view.state is InstanceState.STOPPED):
            raise ValueError(f"there is an instance {spec.name!r} already")
        instance = Instance(spec, self._around)
        self._instances[spec.name] = instance
        if self._tasks is not None:
            self._begin(instance, self._tasks)

    def refuse(self, spec: InstanceSpec, reason: str) -> None:
        """What cannot even be tried is told as FATAL, in a moment, and is there until it is retired."""
        self._refused[spec.name] = spec
        self._tell_soon(InstanceChanged(spec, InstanceState.FATAL, reason))

    def _tell_soon(self, change: InstanceChanged) -> None:
        """Not within the call of somebody who may be told of it himself."""
        asyncio.get_running_loop().call_soon(self._around.on_change, change)

    def _begin(self, instance: Instance, tasks: asyncio.TaskGroup) -> None:
        self._running[instance] = tasks.create_task(instance.run(), name=f"instance {instance.name}")

    async def _ask_version(self, url: str, timeout_seconds: float) -> str:
        if self._probe is None:
            raise ProbeFailed("the supervisor does not run")
        return await self._probe(url, timeout_seconds)

    # --- asking --------------------------------------------------------------------------------------------

    def retire(self, name: InstanceName) -> None:
        """Stops an instance for good and forgets it, without waiting for that. KeyError for an unknown name."""
        refused = self._refused.pop(name, None)
        if refused is not None:
            self._tell_soon(InstanceChanged(refused, InstanceState.STOPPED))
            return
        instance = self._instances[name]
        if self._tasks is not None and instance not in self._retiring:
            self._retiring.add(instance)
            self._tasks.create_task(self._retire(instance), name=f"end of instance {name}")

    async def _retire(self, instance: Instance) -> None:
        instance.stop()
        await self._stopped(instance)
        if self._instances.get(instance.name) is instance:
            del self._instances[instance.name]
        self._retiring.discard(instance)
        self._running.pop(instance).cancel()

    def drain_all(self) -> None:
        """No instance takes new requests."""
        for instance in self._instances.values():
            instance.drain()

    async def stop_all(self) -> None:
        """Stops all instances at the same time, politely first; then `run` returns. Ends by itself within deadlines."""
        for instance in self._instances.values():
            instance.stop()
        await asyncio.gather(*(self._stopped(instance) for instance in self._instances.values()))
        self._closing.set()

    def kill_all(self) -> None:
        """SIGKILL to every process group, at once: for the second signal. `stop_all` still has to be awaited."""
        for instance in self._instances.values():
            instance.kill()

    async def _stopped(self, instance: Instance) -> None:
        try:
            async with asyncio.timeout(self._config.stop_timeout_seconds + _GONE_SECONDS):
                await instance.wait_for(InstanceState.STOPPED)
        except TimeoutError:
            self._log.error("instance_does_not_stop", instance=instance.name, pid=instance.pid)

    # --- reading -------------------------------------------------------------------------------------------

    @property
    def views(self) -> tuple[InstanceView, ...]:
        return tuple(instance.view for instance in self._instances.values())

    def pid(self, name: InstanceName) -> int | None:
        """The server's process number; None while there is no process, and for attached instances."""
        return self._instances[name].pid

    async def wait_for(self, name: InstanceName, *states: InstanceState) -> None:
        """Returns when the instance is in one of the states; no deadline of its own."""
        await self._instances[name].wait_for(*states)
