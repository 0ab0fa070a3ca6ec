"""Kills orphans: servers and runners that an earlier router left behind when it died.

Orphans are found by marks in their environment. A process is an orphan only if it runs as the same user, has the mark
of this state directory, and its router is dead; of a kept server, its keeper (`kept_process.py`). So concurrent
routers, even with the same state directory, do not kill each other's children, and a process that only looks like
Ollama is never killed.
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
"""Index in /proc/PID/stat of the fields after the command's closing bracket (proc_pid_stat(5), field 22)."""

_POLL_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class ReapedOrphan:
    """An orphan that was killed."""

    pid: int
    instance: InstanceName
    command: str


class ReapFailed(Exception):
    """Orphans were still running after SIGKILL at the deadline; the message has their pids."""


def run_id() -> str:
    """Returns a unique id of this process: its pid and, because pids are reused, its start time."""
    return run_id_of(os.getpid())


def run_id_of(pid: int) -> str:
    """Returns the same of another process."""
    return f"{pid}-{_start_time(pid)}"


def marked_processes(variable: str, mark: str) -> list[psutil.Process]:
    """Returns the living processes of this user in whose environment the variable has this value."""
    return [p for p in psutil.process_iter() if _environment(p).get(variable) == mark and _is_alive(p)]


def process_marks(state_directory: str, owner_run_id: str, name: InstanceName) -> dict[str, str]:
    """Returns the environment variables by which a child and its descendants can be found later."""
    return {**state_mark(state_directory), INSTANCE_VARIABLE: f"{owner_run_id}:{name}"}


def state_mark(state_directory: str) -> dict[str, str]:
    """Returns the one that names the state directory."""
    return {STATE_VARIABLE: str(Path(state_directory).resolve())}


def reap_orphans(state_directory: str, deadline_seconds: float = 10.0) -> tuple[ReapedOrphan, ...]:
    """Kills all orphans of the state directory and waits until they are gone. Blocking; call it before serving.

    Raises:
        ReapFailed: an orphan is still running at the deadline.
    """
    reaped: list[ReapedOrphan] = []
    while orphans := _find_orphans(str(Path(state_directory).resolve())):
        for process, instance in orphans.items():
            with contextlib.suppress(psutil.Error):
                reaped.append(ReapedOrphan(process.pid, instance, " ".join(process.cmdline())))
                process.kill()
        survivors = _wait_for_exit(list(orphans), deadline_seconds)
        if survivors:
            pids = ", ".join(str(process.pid) for process in survivors)
            raise ReapFailed(f"cannot kill processes left by an earlier run: {pids}; see `ps -fp` and the kernel log")
    return tuple(reaped)


def _wait_for_exit(processes: list[psutil.Process], deadline_seconds: float) -> list[psutil.Process]:
    """Returns the processes that still run at the deadline. Zombies count as exited."""
    end = time.monotonic() + deadline_seconds
    while (running := [process for process in processes if _is_alive(process)]) and time.monotonic() < end:
        psutil.wait_procs(running, timeout=_POLL_SECONDS)
    return running


def _find_orphans(state_directory: str) -> dict[psutil.Process, InstanceName]:
    orphans: dict[psutil.Process, InstanceName] = {}
    for process in psutil.process_iter():
        environment = _environment(process)
        if environment.get(STATE_VARIABLE) != state_directory:
            continue
        owner_run_id, _, instance = environment.get(INSTANCE_VARIABLE, "").partition(":")
        if instance and not _is_owner_alive(owner_run_id) and _is_alive(process) and _in_our_pid_namespace(process.pid):
            orphans[process] = InstanceName(instance)
    return orphans


def _environment(process: psutil.Process) -> Mapping[str, str]:
    """Returns the environment of a process; empty if it is another user's or has exited."""
    try:
        return process.environ() if process.uids().real == os.getuid() else {}
    except (psutil.Error, OSError):
        return {}


def _is_owner_alive(owner_run_id: str) -> bool:
    pid, _, started = owner_run_id.partition("-")
    return pid.isdecimal() and psutil.pid_exists(int(pid)) and _start_time(int(pid)) == started


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _in_our_pid_namespace(pid: int) -> bool:
    """Returns whether the process shares our pid namespace: pids in a container's marks mean nothing outside of it."""
    try:
        return Path(f"/proc/{pid}/ns/pid").readlink() == Path("/proc/self/ns/pid").readlink()
    except OSError:
        return False


def _start_time(pid: int) -> str:
    """Returns the start time in clock ticks since boot, which wall clock changes do not affect; "" if it has exited."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[_START_TIME_FIELD]
