"""Finds and kills what a router that died left behind: servers and runners, by the marks in their environment.

A process is swept only if it is of the same user, bears this state directory's mark, and its router is dead. So routers
that run side by side, even with one state directory, leave each other's children alone. Sweeps no process that merely
looks like Ollama.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from router.domain.instance import InstanceName
from router.supervisor.process import INSTANCE_VARIABLE, STATE_VARIABLE

_START_TIME_FIELD = 19
"""Of /proc/PID/stat, counted after the command's closing bracket (proc_pid_stat(5): field 22)."""

_POLL_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Swept:
    """One leftover that was killed."""

    pid: int
    instance: InstanceName
    command: str


class SweepFailed(Exception):
    """Leftovers withstood SIGKILL until the deadline; the text names them."""


def run_id() -> str:
    """Names this process for good: its number and, because numbers come again, when it started."""
    return f"{os.getpid()}-{_start_time(os.getpid())}"


def marks(state_directory: str, run: str, name: InstanceName) -> dict[str, str]:
    """The variables by which a child, and all that it starts, is found again."""
    return {STATE_VARIABLE: str(Path(state_directory).resolve()), INSTANCE_VARIABLE: f"{run}:{name}"}


def sweep(state_directory: str, deadline_seconds: float = 10.0) -> tuple[Swept, ...]:
    """Kills all leftovers of that state directory and waits until they are gone. Blocking; call it before serving.

    Raises SweepFailed where one is still there at the deadline.
    """
    swept: list[Swept] = []
    while found := _leftovers(str(Path(state_directory).resolve())):
        for process, instance in found.items():
            with contextlib.suppress(psutil.Error):
                swept.append(Swept(process.pid, instance, " ".join(process.cmdline())))
                process.kill()
        stuck = _wait_dead(list(found), deadline_seconds)
        if stuck:
            pids = ", ".join(str(process.pid) for process in stuck)
            raise SweepFailed(f"processes left by an earlier run do not die: {pids}; see `ps -fp` and the kernel's log")
    return tuple(swept)


def _wait_dead(processes: list[psutil.Process], deadline_seconds: float) -> list[psutil.Process]:
    """Those that still live at the deadline. Dead ones that nobody reaps count as dead."""
    end = time.monotonic() + deadline_seconds
    while (living := [process for process in processes if _is_alive(process)]) and time.monotonic() < end:
        psutil.wait_procs(living, timeout=_POLL_SECONDS)
    return living


def _leftovers(state_directory: str) -> dict[psutil.Process, InstanceName]:
    found: dict[psutil.Process, InstanceName] = {}
    for process in psutil.process_iter():
        environment = _environment(process)
        if environment.get(STATE_VARIABLE) != state_directory:
            continue
        run, _, instance = environment.get(INSTANCE_VARIABLE, "").partition(":")
        if instance and not _owner_lives(run) and _is_alive(process) and _same_namespace(process.pid):
            found[process] = InstanceName(instance)
    return found


def _environment(process: psutil.Process) -> Mapping[str, str]:
    """Empty for those of other users, and for the dead."""
    try:
        return process.environ() if process.uids().real == os.getuid() else {}
    except (psutil.Error, OSError):
        return {}


def _owner_lives(run: str) -> bool:
    pid, _, started = run.partition("-")
    return pid.isdecimal() and psutil.pid_exists(int(pid)) and _start_time(int(pid)) == started


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _same_namespace(pid: int) -> bool:
    """Whether process numbers mean the same to it: a router in a container names its children by other numbers."""
    try:
        return Path(f"/proc/{pid}/ns/pid").readlink() == Path("/proc/self/ns/pid").readlink()
    except OSError:
        return False


def _start_time(pid: int) -> str:
    """When it started, in clock ticks since boot, which no change of the wall clock moves; "" if it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[_START_TIME_FIELD]
