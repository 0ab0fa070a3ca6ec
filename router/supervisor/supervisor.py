"""Runs all instances, one task each, and reports every change of their state.

However `run` ends, every process that it started has ended too, but for servers that `leave_all` has left to the next
router: their keepers end them if none comes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import structlog

from router.domain.events import InstanceChanged, LoadMeasured
from router.domain.instance import InstanceName, InstanceSpec, InstanceState, InstanceView
from router.engines.base import ServerRules
from router.supervisor.clock import Clock, SystemClock
from router.supervisor.instance import Instance, InstanceContext, SupervisorConfig
from router.supervisor.kept_process import Claim
from router.supervisor.output_log import OutputLog

__all__ = ["Supervisor", "SupervisorConfig"]

_KILL_TIMEOUT_SECONDS = 15.0
"""Extra time for a stop after its timeout: SIGKILL, and the kernel freeing the memory of a large process."""


class Supervisor:
    """Owns the instances. `add` them before or during `run`. Call all methods in the event loop of `run`.

    Use the main thread: the thread must live at least as long as the servers (see `ChildProcess.spawn`).
    """

    def __init__(
        self,
        config: SupervisorConfig,
        engines: Mapping[str, ServerRules],
        on_change: Callable[[InstanceChanged], None],
        clock: Clock | None = None,
        on_load: Callable[[LoadMeasured], None] = lambda _: None,
        is_loading: Callable[[InstanceName], bool] = lambda _: False,
    ) -> None:
        """`engines`: by kind, one for every kind of instance that will be added."""
        self._config = config
        self._instances: dict[InstanceName, Instance] = {}
        self.output = OutputLog()
        """What all instances have written."""
        clock = clock or SystemClock()
        self._context = InstanceContext(config, clock, engines, on_change, on_load, is_loading, self.output)
        self._tasks: asyncio.TaskGroup | None = None
        self._running: dict[Instance, asyncio.Task[None]] = {}
        self._retiring: set[Instance] = set()
        self._refused: dict[InstanceName, InstanceSpec] = {}
        self._closing = asyncio.Event()
        self._log = structlog.get_logger("router.supervisor")

    # --- running -------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Runs the instances until `stop_all` has stopped them. Cancellation kills them."""
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            for instance in self._instances.values():
                self._start_task(instance, tasks)
            await self._closing.wait()
            for task in self._running.values():
                task.cancel()

    def add(self, spec: InstanceSpec, claim: Claim | None = None) -> None:
        """Adds an instance and starts it, with the server of an earlier router where one was claimed for it.

        A retired instance that has stopped no longer blocks its name: `on_change` may add the next one at once.

        Raises:
            ValueError: there is an instance of that name.
        """
        existing = self._instances.get(spec.name)
        if existing is not None and not (existing in self._retiring and existing.view.state is InstanceState.STOPPED):
            raise ValueError(f"there is an instance {spec.name!r} already")
        instance = Instance(spec, self._context, claim)
        self._instances[spec.name] = instance
        if self._tasks is not None:
            self._start_task(instance, self._tasks)

    def refuse(self, spec: InstanceSpec, reason: str) -> None:
        """Reports as FATAL, soon, an instance that cannot be started. It exists until it is retired."""
        self._refused[spec.name] = spec
        self._report_soon(InstanceChanged(spec, InstanceState.FATAL, reason))

    def _report_soon(self, change: InstanceChanged) -> None:
        """Calls `on_change` from the event loop, because the current caller may be the one who is notified."""
        asyncio.get_running_loop().call_soon(self._context.on_change, change)

    def _start_task(self, instance: Instance, tasks: asyncio.TaskGroup) -> None:
        self._running[instance] = tasks.create_task(instance.run(), name=f"instance {instance.name}")

    # --- requests ------------------------------------------------------------------------------------------

    def retire(self, name: InstanceName) -> None:
        """Stops and removes an instance; does not wait for it.

        Raises:
            KeyError: there is no instance of that name.
        """
        refused = self._refused.pop(name, None)
        if refused is not None:
            self._report_soon(InstanceChanged(refused, InstanceState.STOPPED))
            return
        instance = self._instances[name]
        if self._tasks is not None and instance not in self._retiring:
            self._retiring.add(instance)
            self._tasks.create_task(self._stop_and_remove(instance), name=f"end of instance {name}")

    def restart(self, name: InstanceName, reason: str) -> None:
        """Ends the server of an instance at once; does not wait for it. One on demand is retired, others start again,
        also those that had given up.

        Raises:
            KeyError: there is no instance of that name.
        """
        instance = self._instances[name]
        if instance.spec.on_demand:
            self.retire(name)
        elif instance.view.state is InstanceState.FATAL and self._tasks is not None:
            self._start_task(instance, self._tasks)
        else:
            instance.restart(reason)

    async def _stop_and_remove(self, instance: Instance) -> None:
        instance.stop()
        await self._wait_until_stopped(instance)
        if self._instances.get(instance.name) is instance:
            del self._instances[instance.name]
        self._retiring.discard(instance)
        self._running.pop(instance).cancel()

    def drain_all(self) -> None:
        """Takes all instances out of service; running requests continue."""
        for instance in self._instances.values():
            instance.drain()

    async def stop_all(self) -> None:
        """Stops all instances concurrently, with SIGTERM first; then `run` returns. Takes bounded time."""
        for instance in self._instances.values():
            instance.stop()
        await asyncio.gather(*(self._wait_until_stopped(instance) for instance in self._instances.values()))
        self._closing.set()

    async def leave_all(self) -> None:
        """As `stop_all`, but servers that are kept and READY are left to the next router."""
        for instance in self._instances.values():
            instance.leave()
        await self.stop_all()

    def kill_all(self) -> None:
        """Sends SIGKILL to every process group at once, as on a second signal. `stop_all` must still be awaited."""
        for instance in self._instances.values():
            instance.kill()

    async def _wait_until_stopped(self, instance: Instance) -> None:
        try:
            async with asyncio.timeout(self._config.stop_timeout_seconds + _KILL_TIMEOUT_SECONDS):
                await instance.wait_for(InstanceState.STOPPED)
        except TimeoutError:
            self._log.error("instance_does_not_stop", instance=instance.name, pid=instance.pid)

    # --- state ---------------------------------------------------------------------------------------------

    @property
    def views(self) -> tuple[InstanceView, ...]:
        return tuple(instance.view for instance in self._instances.values())

    def pid(self, name: InstanceName) -> int | None:
        """Returns the pid of the server; None while there is no process, and for attached instances."""
        return self._instances[name].pid

    async def wait_for(self, name: InstanceName, *states: InstanceState) -> None:
        """Waits, without a deadline, until the instance is in one of the states."""
        await self._instances[name].wait_for(*states)
