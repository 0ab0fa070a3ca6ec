"""How much host memory programs may still take: what the kernel calls available, within a container's limit."""

from __future__ import annotations

from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")


def host_free_bytes(cgroup: Path = _CGROUP) -> int | None:
    """Bytes, page cache included, which gives way; None where it cannot be read. Takes some tens of microseconds."""
    try:
        available = psutil.virtual_memory().available
        limit = (cgroup / "memory.max").read_text().strip() if (cgroup / "memory.max").exists() else "max"
        if not limit.isdecimal():
            return available
        used = int((cgroup / "memory.current").read_text())
        cached = _file_bytes((cgroup / "memory.stat").read_text())
    except (OSError, ValueError):
        return None
    return min(available, int(limit) - used + cached)


def _file_bytes(stat: str) -> int:
    """The page cache of a cgroup, by its `memory.stat`."""
    rows = (line.split() for line in stat.splitlines())
    return sum(int(value) for name, value in rows if name in ("inactive_file", "active_file"))
