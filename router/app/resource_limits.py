"""Limits of the operating system that a busy router meets: file descriptors, and the memory of its control group."""

from __future__ import annotations

import contextlib
import resource
from pathlib import Path

import structlog

_DESCRIPTORS_MIN = 4096
"""Each client and each connection to a server takes one; below this a few hundred streams can use them up."""
_CGROUP = Path("/sys/fs/cgroup")
_SELF = Path("/proc/self/cgroup")


def apply_limits() -> None:
    """Raises the soft limit on file descriptors to the hard one, and logs limits that are low."""
    log = structlog.get_logger("router")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if 0 <= descriptors < _DESCRIPTORS_MIN:
        log.warning("file_descriptors_few", limit=descriptors, effect="raise LimitNOFILE, or `ulimit -n`")
    memory = cgroup_memory_bytes(_SELF, _CGROUP)
    if memory is not None:
        log.info("memory_limited", limit_bytes=memory, effect="the router and its servers share it")


def cgroup_memory_bytes(own: Path, root: Path) -> int | None:
    """The lowest memory limit of this process's control groups (version 2); None if there is none.

    `own`: /proc/self/cgroup; `root`: where the hierarchy is mounted.
    """
    try:
        line = next(line for line in own.read_text(encoding="utf-8").splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return None
    group = root / line[3:].lstrip("/")
    limits: list[int] = []
    for folder in (group, *group.parents):
        if not folder.is_relative_to(root):
            break
        with contextlib.suppress(OSError, ValueError):
            limits.append(int((folder / "memory.max").read_text(encoding="utf-8")))
    return min(limits, default=None)
