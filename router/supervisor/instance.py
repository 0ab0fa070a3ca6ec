"""One supervised instance: a task that starts its server, checks its health, and restarts it when it fails.

`domain/instance_lifecycle.py` defines the possible transitions. This module makes them with a real process, or
without one for an attached instance. Other code can read the state and ask the instance to drain or stop; only the
instance itself changes its state.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import structlog

from router.domain.adoption import ServerRecord, relevant
from router.domain.events import InstanceChanged, LoadMeasured
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
from router.engines.base import ProbeFailed, ServerRules
from router.supervisor.clock import Clock, run_unless_set
from router.supervisor.kept_process import Claim, KeepRules, KeptProcess
from router.supervisor.orphan_reaper import process_marks, state_mark
from router.supervisor.output_log import OutputLog
from router.supervisor.parent_death_shim import EXIT_NOT_EXECUTED
from router.supervisor.process import ChildProcess, ServerProcess, program_identity

_START_POLL_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class SupervisorConfig:
    """How instances are started and watched."""

    state_directory: str
    """Marks the children, so that a later run with the same directory finds orphans of this one."""
    run_id: str
    """From `orphan_reaper.run_id()`; identifies the router that owns the children."""
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    """Environment of all children, in addition to their spec's; see `process.inheritable_environment`."""
    start_timeout_seconds: float = 60.0
    """Until the health probe answers and the GPUs are reported. Ollama's GPU discovery alone may take 30 s."""
    health_interval_seconds: float = 5.0
    health_timeout_seconds: float = 5.0
    health_misses_max: int = 3
    """Number of consecutive failed health checks after which a server counts as hung."""
    stop_timeout_seconds: float = 10.0
    """Between SIGTERM and SIGKILL."""
    reason_lines_max: int = 10
    """Number of last output lines that go into the reason of a failure."""
    keep: KeepRules | None = None
    """How servers are kept for the next router; None: they end with this one."""
    restart: RestartPolicy = field(default_factory=RestartPolicy)


@dataclass(frozen=True, slots=True)
class InstanceContext:
    """What all instances of one supervisor share."""

    config: SupervisorConfig
    clock: Clock
    engines: Mapping[str, ServerRules]
    """By kind; each instance follows the rules of its engine."""
    on_change: Callable[[InstanceChanged], None]
    on_load: Callable[[LoadMeasured], None]
    """Called with what a server's output says of each load."""
    is_loading: Callable[[InstanceName], bool]
    """Whether a load runs there; it has a timeout of its own, and may keep the server from answering a probe."""
    output: OutputLog = field(default_factory=OutputLog)


class Instance:
    """An actor: `run` makes all transitions; the other methods only request one, and return at once."""

    def __init__(self, spec: InstanceSpec, context: InstanceContext, claim: Claim | None = None) -> None:
        """`claim`: a server of an earlier router, which the instance begins with."""
        self.spec = spec
        self._context = context
        self._config = context.config
        self._engine = context.engines[spec.engine]
        self._command = self._engine.command(spec)
        self._log = structlog.get_logger("router.supervisor").bind(instance=spec.name)
        self._state = InstanceState.STOPPED
        self._reason = ""
        self._version: str | None = None
        self._state_changed = asyncio.Event()
        self._stop = asyncio.Event()
        self._restart = asyncio.Event()
        self._restart_reason = ""
        self._child: ServerProcess | None = None
        self._claim = claim
        self._adopted = ""
        """What is said of an adopted server; empty for others."""
        self._is_left = False
        self._ready_at: float | None = None
        self._quick_deaths = 0
        self._last_lines: deque[str] = deque(maxlen=context.config.reason_lines_max)
        self._gpu_report = self._engine.gpu_report(spec)
        self._load_reader = self._engine.load_reader(spec)
        self._device_reported = asyncio.Event()

    # --- state and requests ----------------------------------------------------------------------------------

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
        """Takes it out of service: to DRAINING if it is serving, else stops it."""
        if can_move(self._state, Trigger.DRAIN):
            self._transition(Trigger.DRAIN)
        elif self._state is not InstanceState.DRAINING:
            self.stop()

    def stop(self) -> None:
        """Requests a stop: SIGTERM, then SIGKILL after `stop_timeout_seconds`."""
        self._stop.set()
        self._stop_if_fatal()

    def leave(self) -> None:
        """Requests the end of the instance; its server is left to the next router, if it is kept and READY."""
        self._is_left = self._config.keep is not None
        self.stop()

    def restart(self, reason: str) -> None:
        """Requests that a READY server is killed and started again; it does not count as a quick death."""
        self._restart_reason = reason
        self._restart.set()

    def kill(self) -> None:
        """Requests a stop with SIGKILL, at once."""
        self._is_left = False
        self.stop()
        if self._child is not None:
            self._child.kill()

    async def wait_for(self, *states: InstanceState) -> None:
        """Waits, without a deadline, until it is in one of the states."""
        while self._state not in states:
            await self._state_changed.wait()

    # --- a supervised server ---------------------------------------------------------------------------------

    async def run(self) -> None:
        """Runs until it is STOPPED or FATAL; cancelled, it leaves no process behind."""
        if not self._stop.is_set():
            await (self._follow_attached() if self.spec.attached else self._supervise())

    async def _supervise(self) -> None:
        """Starts and restarts the server until the instance is STOPPED or FATAL."""
        self._quick_deaths = 0
        while True:
            self._transition(Trigger.START)
            await self._run_process()
            if self._state is not InstanceState.BACKOFF:
                return
            await run_unless_set(self._stop, self._context.clock.sleep(self._restart_wait_seconds))
            if self._stop.is_set():
                self._transition(Trigger.STOP)
                return

    @property
    def _restart_wait_seconds(self) -> float:
        return wait_seconds(self._quick_deaths, self._config.restart)

    async def _run_process(self) -> None:
        """Runs one process to its end; then the state is BACKOFF, FATAL or STOPPED, and the process group is gone."""
        self._reset_output()
        try:
            child = self._spawn_or_adopt()
        except OSError as error:
            self._fail(f"cannot start {self._command[0]}: {error}")
            return
        self._child = child
        is_left = False
        try:
            failure = await run_unless_set(self._stop, self._serve(child))
            if failure is None:
                self._transition(Trigger.STOP)
                is_left = self._leave_to_next(child)
                if not is_left:
                    await child.stop(self._config.stop_timeout_seconds)
            elif self._state is not InstanceState.DRAINING:
                self._fail(failure)
        finally:
            if not is_left:
                await self._kill_leftovers(child)
        if self._stop.is_set():
            self._stop_if_fatal()
        if can_move(self._state, Trigger.EXITED):
            self._transition(Trigger.EXITED)

    def _leave_to_next(self, child: ServerProcess) -> bool:
        """Whether the server is left running: a keeper looks after it until the next router adopts it."""
        keep = self._config.keep
        if keep is None or not self._is_left or self._ready_at is None or not isinstance(child, KeptProcess):
            return False
        if child.problem or child.exited.is_set():
            return False
        self._log.info("server_left", pid=child.pid, deadline_seconds=keep.deadline_seconds)
        child.leave()
        self._child = None
        return True

    async def _kill_leftovers(self, child: ServerProcess) -> None:
        """Kills the rest of the process group, runners included."""
        if not await child.wait_gone():
            self._log.error("instance_outlives_sigkill", pid=child.pid)
        self._child = None

    def _stop_if_fatal(self) -> None:
        """Moves from FATAL to STOPPED, but only once nothing is left of the process group."""
        if self._state is InstanceState.FATAL and self._child is None:
            self._transition(Trigger.STOP)

    def _reset_output(self) -> None:
        self._last_lines.clear()
        self._gpu_report = self._engine.gpu_report(self.spec)
        self._load_reader = self._engine.load_reader(self.spec)
        self._device_reported.clear()
        self._ready_at = None
        self._adopted = ""
        self._restart.clear()

    def _spawn_or_adopt(self) -> ServerProcess:
        claim, self._claim = self._claim, None
        if claim is None:
            return self._spawn()
        self._adopted = f"adopted: an earlier router's server, pid {claim.server_pid}"
        return KeptProcess.adopt(claim, self._on_output_line)

    def _spawn(self) -> ServerProcess:
        config = self._config
        environment = {**config.environment, **self.spec.environment}
        if config.keep is not None:
            environment |= state_mark(config.state_directory)
            program, inherited = program_identity(self._command[0]), relevant(config.environment)
            record = ServerRecord(self.spec, self._command, program, inherited)
            return KeptProcess.spawn(record, environment, config.keep, self._on_output_line)
        environment |= process_marks(config.state_directory, config.run_id, self.name)
        return ChildProcess.spawn(self._command, environment, self._on_output_line)

    async def _serve(self, child: ServerProcess) -> str:
        """Waits until the server is READY and watches it. Returns why it is no longer usable."""
        failure = await run_unless_set(child.exited, self._serve_until_unhealthy())
        if failure is None:
            await child.read_last_output()
            failure = self._describe_exit(child)
        return self._with_last_lines(failure)

    async def _serve_until_unhealthy(self) -> str:
        try:
            async with asyncio.timeout(self._config.start_timeout_seconds):
                version = await self._wait_for_version()
                problem = None if self._adopted else await self._wait_for_gpus()
        except TimeoutError:
            return self._describe_start_timeout()
        if problem is not None:
            return problem
        self._warn_of_unexpected_devices()
        if isinstance(self._child, KeptProcess):
            self._child.ready(version)
            if self._child.problem:
                self._log.warning("server_not_kept", reason=self._child.problem)
        self._enter_ready(version)
        return await run_unless_set(self._restart, self._check_health()) or self._restart_reason

    async def _wait_for_version(self) -> str:
        while True:
            try:
                return await self._engine.probe(self.spec.url, self._config.health_timeout_seconds)
            except ProbeFailed:
                await asyncio.sleep(_START_POLL_SECONDS)

    async def _wait_for_gpus(self) -> str | None:
        """Returns None once all expected GPUs are reported, or a problem as soon as the server reports only the CPU."""
        while (problem := self._gpu_report.problem) is not None:
            if self._gpu_report.is_final:
                return problem
            self._device_reported.clear()
            await self._device_reported.wait()
        return None

    def _describe_start_timeout(self) -> str:
        timeout = f"within {self._config.start_timeout_seconds:g} s"
        problem = self._gpu_report.problem
        return f"{problem} {timeout}" if problem and self._gpu_report.has_devices else f"was not ready {timeout}"

    def _enter_ready(self, version: str) -> None:
        self._version = version
        self._ready_at = self._context.clock.now()
        self._transition(Trigger.ANSWERED, self._adopted)

    async def _check_health(self) -> str:
        """Runs health checks until several in a row have failed while no load runs. Returns the problem."""
        misses, problem = 0, ""
        while misses < self._config.health_misses_max or self._context.is_loading(self.name):
            await self._context.clock.sleep(self._config.health_interval_seconds)
            try:
                await self._engine.probe(self.spec.url, self._config.health_timeout_seconds)
                misses = 0
            except ProbeFailed as error:
                if error.is_local:
                    self._log.error("instance_not_asked", error=str(error))
                    continue
                misses, problem = misses + 1, str(error)
                self._log.warning("instance_health_check_missed", misses=misses, error=problem)
        return f"hangs: {misses} health checks in a row failed; the last one: {problem}"

    # --- an attached server --------------------------------------------------------------------------------

    async def _follow_attached(self) -> None:
        """Watches a server that something else runs until a stop is requested. It never becomes FATAL."""
        self._transition(Trigger.START)
        await run_unless_set(self._stop, self._poll_attached())
        self._transition(Trigger.STOP)
        if can_move(self._state, Trigger.EXITED):
            self._transition(Trigger.EXITED)

    async def _poll_attached(self) -> None:
        misses = 0
        while True:
            try:
                version = await self._engine.probe(self.spec.url, self._config.health_timeout_seconds)
                misses = 0
                self._attached_answered(version)
            except ProbeFailed as error:
                if not error.is_local:
                    misses += 1
                    self._attached_failed(misses, str(error))
            await self._context.clock.sleep(self._config.health_interval_seconds)

    def _attached_answered(self, version: str) -> None:
        if can_move(self._state, Trigger.ANSWERED):
            self._enter_ready(version)
        elif version != self._version:
            self._version = version
            self._announce()

    def _attached_failed(self, misses: int, problem: str) -> None:
        """Moves to BACKOFF after one miss if the server never answered, after several if it did."""
        starting, reason = self._state is InstanceState.STARTING, f"the attached server does not answer: {problem}"
        if can_move(self._state, Trigger.FAILED) and (starting or misses >= self._config.health_misses_max):
            self._transition(Trigger.FAILED, reason)
        elif self._state is InstanceState.BACKOFF and self._reason != reason:
            self._reason = reason
            self._announce()

    # --- transitions ---------------------------------------------------------------------------------------

    def _fail(self, reason: str) -> None:
        uptime = 0.0 if self._ready_at is None else self._context.clock.now() - self._ready_at
        policy = self._config.restart
        if self._restart.is_set():
            uptime = policy.quick_death_seconds
        self._quick_deaths = quick_deaths_after(self._quick_deaths, uptime, policy)
        if is_fatal(self._quick_deaths, policy):
            self._transition(
                Trigger.GAVE_UP, f"failed {self._quick_deaths} times in a row and is not restarted; {reason}"
            )
        else:
            self._transition(Trigger.FAILED, f"{reason}; restart in {self._restart_wait_seconds:g} s")

    def _transition(self, trigger: Trigger, reason: str = "") -> None:
        self._state = next_state(self._state, trigger)
        self._reason = reason
        if self._state not in (InstanceState.READY, InstanceState.DRAINING):
            self._version = None
        self._announce()

    def _announce(self) -> None:
        change = InstanceChanged(self.spec, self._state, self._reason, self._version)
        failed = self._state in (InstanceState.BACKOFF, InstanceState.FATAL)
        write = self._log.error if failed else self._log.info
        write("instance_state", state=str(self._state), reason=self._reason, version=self._version, pid=self.pid)
        state_changed, self._state_changed = self._state_changed, asyncio.Event()
        state_changed.set()
        self._context.on_change(change)

    # --- output --------------------------------------------------------------------------------------------

    def _on_output_line(self, line: str) -> None:
        self._last_lines.append(line)
        self._context.output.append(self.name, line)
        self._log.debug("instance_output", line=line)
        if self._gpu_report.read_line(line):
            self._device_reported.set()
        measured = self._load_reader.read_line(line)
        if measured is not None:
            self._context.on_load(measured)

    def _warn_of_unexpected_devices(self) -> None:
        unexpected = self._gpu_report.unexpected
        if unexpected:
            self._log.warning("instance_sees_unexpected_gpus", gpus=", ".join(unexpected))

    def _describe_exit(self, child: ServerProcess) -> str:
        code = child.returncode or 0
        if code == EXIT_NOT_EXECUTED:
            return f"{self._command[0]} cannot be executed"
        return f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"

    def _with_last_lines(self, reason: str) -> str:
        return f"{reason}; last lines: {' | '.join(self._last_lines)}" if self._last_lines else reason
