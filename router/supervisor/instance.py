"""One supervised instance: a task that starts its server, watches it, and starts it again when it fails.

The table in `domain/instance_lifecycle.py` says which moves are possible; this carries them out with a real process,
or for an attached instance with none. Other code reads its state and asks it to start, drain or stop; nobody else
moves it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import structlog

from router.domain.events import InstanceChanged
from router.domain.instance import InstanceName, InstanceSpec, InstanceState, InstanceView
from router.domain.instance_lifecycle import (
    RestartPolicy,
    Trigger,
    can_move,
    is_fatal,
    next_state,
    quick_deaths_after,
    wait_seconds,
)
from router.engines.ollama.health_probe import Probe, ProbeFailed
from router.engines.ollama.log_parser import (
    ComputeDevice,
    gpus_problem,
    parse_compute_line,
    unexpected_devices,
)
from router.supervisor.clock import Clock, run_unless_set
from router.supervisor.orphan_reaper import process_marks
from router.supervisor.parent_death_shim import EXIT_NOT_EXECUTED
from router.supervisor.process import ChildProcess

_START_POLL_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class SupervisorConfig:
    """How instances are started and watched."""

    command: tuple[str, ...]
    """The program and its arguments: `("/usr/bin/ollama", "serve")`."""
    state_directory: str
    """Marks the children, so that a later run with the same directory finds what this one leaves."""
    run_id: str
    """From `orphan_reaper.run_id()`: whose children they are."""
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    """What children are given beside their spec's environment; see `process.inheritable_environment`."""
    start_timeout_seconds: float = 60.0
    """Until `/api/version` answers and the GPUs are reported; Ollama allows its own discovery 30 s."""
    health_interval_seconds: float = 5.0
    health_timeout_seconds: float = 5.0
    health_misses_max: int = 3
    """So many unanswered health checks in a row, and a server counts as hung."""
    stop_timeout_seconds: float = 10.0
    """Between SIGTERM and SIGKILL."""
    reason_lines_max: int = 10
    """Last lines of output that go into the reason of a failure."""
    restart: RestartPolicy = field(default_factory=RestartPolicy)


@dataclass(frozen=True, slots=True)
class InstanceContext:
    """What all instances of a supervisor share."""

    config: SupervisorConfig
    clock: Clock
    probe: Probe
    on_change: Callable[[InstanceChanged], None]


class Instance:
    """The actor. `run` owns its life; the other methods only ask, and return at once."""

    def __init__(self, spec: InstanceSpec, around: InstanceContext) -> None:
        self.spec = spec
        self._around = around
        self._config = around.config
        self._log = structlog.get_logger("router.fleet").bind(instance=spec.name)
        self._state = InstanceState.STOPPED
        self._reason = ""
        self._version: str | None = None
        self._moved = asyncio.Event()
        self._stop = asyncio.Event()
        self._child: ChildProcess | None = None
        self._ready_at: float | None = None
        self._quick_deaths = 0
        self._tail: deque[str] = deque(maxlen=around.config.reason_lines_max)
        self._devices: list[ComputeDevice] = []
        self._reported = asyncio.Event()

    # --- to read and to ask --------------------------------------------------------------------------------

    @property
    def name(self) -> InstanceName:
        return self.spec.name

    @property
    def view(self) -> InstanceView:
        return InstanceView(self.spec, self._state, self._version, self._reason)

    @property
    def pid(self) -> int | None:
        return self._child.pid if self._child is not None else None

    def drain(self) -> None:
        """Takes it out of service: DRAINING where it serves, else it is stopped."""
        if can_move(self._state, Trigger.DRAIN):
            self._move(Trigger.DRAIN)
        elif self._state is not InstanceState.DRAINING:
            self.stop()

    def stop(self) -> None:
        """Wants it stopped, politely first."""
        self._stop.set()
        self._stop_if_fatal()

    def kill(self) -> None:
        """Wants it stopped at once."""
        self.stop()
        if self._child is not None:
            self._child.kill()

    async def wait_for(self, *states: InstanceState) -> None:
        """Returns when it is in one of the states; no deadline of its own."""
        while self._state not in states:
            await self._moved.wait()

    # --- its life ------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Runs until it is STOPPED or FATAL; cancelled, it leaves no process behind."""
        if not self._stop.is_set():
            await (self._follow() if self.spec.attached else self._supervise())

    async def _supervise(self) -> None:
        """From the first start until it is STOPPED or FATAL."""
        self._quick_deaths = 0
        while True:
            self._move(Trigger.START)
            await self._one_life()
            if self._state is not InstanceState.BACKOFF:
                return
            await run_unless_set(self._stop, self._around.clock.sleep(self._wait_seconds))
            if self._stop.is_set():
                self._move(Trigger.STOP)
                return

    @property
    def _wait_seconds(self) -> float:
        return wait_seconds(self._quick_deaths, self._config.restart)

    async def _one_life(self) -> None:
        """Start to end of one process; afterwards it is BACKOFF, FATAL or STOPPED, and the process group is gone."""
        self._forget_last_life()
        try:
            child = self._spawn()
        except OSError as error:
            self._fail(f"cannot start {self._config.command[0]}: {error}")
            return
        self._child = child
        try:
            failure = await run_unless_set(self._stop, self._serve(child))
            if failure is None:
                self._move(Trigger.STOP)
                await child.stop(self._config.stop_timeout_seconds)
            elif self._state is not InstanceState.DRAINING:
                self._fail(failure)
        finally:
            await self._bury(child)
        if self._stop.is_set():
            self._stop_if_fatal()
        if can_move(self._state, Trigger.EXITED):
            self._move(Trigger.EXITED)

    async def _bury(self, child: ChildProcess) -> None:
        """Kills what is left of the group, runners included."""
        if not await child.wait_gone():
            self._log.error("instance_outlives_sigkill", pid=child.pid)
        self._child = None

    def _stop_if_fatal(self) -> None:
        """FATAL is told as soon as it is known, STOPPED only when nothing is left of the process group."""
        if self._state is InstanceState.FATAL and self._child is None:
            self._move(Trigger.STOP)

    def _forget_last_life(self) -> None:
        self._tail.clear()
        self._devices.clear()
        self._reported.clear()
        self._ready_at = None

    def _spawn(self) -> ChildProcess:
        config = self._config
        environment = {
            **config.environment,
            **self.spec.environment,
            **process_marks(config.state_directory, config.run_id, self.name),
        }
        return ChildProcess.spawn(config.command, environment, self._take_line)

    async def _serve(self, child: ChildProcess) -> str:
        """Gets it READY and watches it; returns why that ended."""
        ended = await run_unless_set(child.exited, self._serve_while_alive())
        if ended is None:
            await child.read_last_output()
            ended = self._death(child)
        return self._with_tail(ended)

    async def _serve_while_alive(self) -> str:
        try:
            async with asyncio.timeout(self._config.start_timeout_seconds):
                version = await self._first_answer()
                problem = await self._gpus_reported()
        except TimeoutError:
            return self._why_not_ready()
        if problem is not None:
            return problem
        self._warn_of_unexpected_devices()
        self._enter_ready(version)
        return await self._until_unhealthy()

    async def _first_answer(self) -> str:
        while True:
            try:
                return await self._around.probe(self.spec.url, self._config.health_timeout_seconds)
            except ProbeFailed:
                await asyncio.sleep(_START_POLL_SECONDS)

    async def _gpus_reported(self) -> str | None:
        """None once all expected GPUs were reported; a problem as soon as the server says that it has only the CPU."""
        while (problem := gpus_problem(self.spec.gpus, self._devices)) is not None:
            if any(device.is_cpu for device in self._devices):
                return problem
            self._reported.clear()
            await self._reported.wait()
        return None

    def _why_not_ready(self) -> str:
        within = f"within {self._config.start_timeout_seconds:g} s"
        problem = gpus_problem(self.spec.gpus, self._devices)
        return f"{problem} {within}" if problem and self._devices else f"was not ready {within}"

    def _enter_ready(self, version: str) -> None:
        self._version = version
        self._ready_at = self._around.clock.now()
        self._move(Trigger.ANSWERED)

    async def _until_unhealthy(self) -> str:
        misses, problem = 0, ""
        while misses < self._config.health_misses_max:
            await self._around.clock.sleep(self._config.health_interval_seconds)
            try:
                await self._around.probe(self.spec.url, self._config.health_timeout_seconds)
                misses = 0
            except ProbeFailed as error:
                misses, problem = misses + 1, str(error)
                self._log.warning("instance_health_check_missed", misses=misses, error=problem)
        return f"hangs: {misses} health checks in a row failed, the last with: {problem}"

    # --- an attached server --------------------------------------------------------------------------------

    async def _follow(self) -> None:
        """Watches a server that something else runs, until it is no longer wanted; it is never FATAL."""
        self._move(Trigger.START)
        await run_unless_set(self._stop, self._follow_for_ever())
        self._move(Trigger.STOP)
        if can_move(self._state, Trigger.EXITED):
            self._move(Trigger.EXITED)

    async def _follow_for_ever(self) -> None:
        misses = 0
        while True:
            try:
                version = await self._around.probe(self.spec.url, self._config.health_timeout_seconds)
                misses = 0
                self._attached_answers(version)
            except ProbeFailed as error:
                misses += 1
                self._attached_misses(misses, str(error))
            await self._around.clock.sleep(self._config.health_interval_seconds)

    def _attached_answers(self, version: str) -> None:
        if can_move(self._state, Trigger.ANSWERED):
            self._enter_ready(version)
        elif version != self._version:
            self._version = version
            self._announce()

    def _attached_misses(self, misses: int, problem: str) -> None:
        """One miss is enough for a server that never answered, several for one that did."""
        starting = self._state is InstanceState.STARTING
        if can_move(self._state, Trigger.FAILED) and (starting or misses >= self._config.health_misses_max):
            self._move(Trigger.FAILED, f"the attached server does not answer: {problem}")

    # --- moves ---------------------------------------------------------------------------------------------

    def _fail(self, reason: str) -> None:
        lived = 0.0 if self._ready_at is None else self._around.clock.now() - self._ready_at
        policy = self._config.restart
        self._quick_deaths = quick_deaths_after(self._quick_deaths, lived, policy)
        if is_fatal(self._quick_deaths, policy):
            self._move(Trigger.GAVE_UP, f"failed {self._quick_deaths} times in a row and is left down; {reason}")
        else:
            self._move(Trigger.FAILED, f"{reason}; again in {self._wait_seconds:g} s")

    def _move(self, trigger: Trigger, reason: str = "") -> None:
        self._state = next_state(self._state, trigger)
        self._reason = reason
        if self._state not in (InstanceState.READY, InstanceState.DRAINING):
            self._version = None
        self._announce()

    def _announce(self) -> None:
        changed = InstanceChanged(self.spec, self._state, self._reason, self._version)
        bad = self._state in (InstanceState.BACKOFF, InstanceState.FATAL)
        write = self._log.error if bad else self._log.info
        write("instance_state", state=str(self._state), reason=self._reason, version=self._version, pid=self.pid)
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()
        self._around.on_change(changed)

    # --- output --------------------------------------------------------------------------------------------

    def _take_line(self, line: str) -> None:
        self._tail.append(line)
        self._log.debug("instance_output", line=line)
        device = parse_compute_line(line)
        if device is not None:
            self._devices.append(device)
            self._reported.set()

    def _warn_of_unexpected_devices(self) -> None:
        extra = unexpected_devices(self.spec.gpus, self._devices)
        if extra:
            names = ", ".join(f"{device.id} ({device.library})" for device in extra)
            self._log.warning("instance_sees_foreign_gpus", gpus=names)

    def _death(self, child: ChildProcess) -> str:
        code = child.returncode or 0
        if code == EXIT_NOT_EXECUTED:
            return f"{self._config.command[0]} does not run"
        return f"died by signal {-code}" if code < 0 else f"ended with exit code {code}"

    def _with_tail(self, reason: str) -> str:
        return f"{reason}; its last lines: {' | '.join(self._tail)}" if self._tail else reason
