"""Memory of EMULATED GPUs, shared between processes through a directory.

`rig.json` lists the GPUs; `vram/PID.json` holds the allocations of one process; allocating takes one file lock. The
allocations of a dead (or zombie) process count as free at once, without cleanup. Uses only the standard library, and
little of it, because every emulated runner imports this module. Reads no clock and makes no decisions.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any, NamedTuple


class OutOfMemoryError(Exception):
    """The GPU has too little free memory; nothing was allocated on any GPU."""

    def __init__(self, uuid: str, wanted_bytes: int, free_bytes: int) -> None:
        super().__init__(f"CUDA error: out of memory on {uuid}: {wanted_bytes} bytes wanted, {free_bytes} free")
        self.uuid = uuid
        self.wanted_bytes = wanted_bytes
        self.free_bytes = free_bytes


class Allocation(NamedTuple):
    """What one process has allocated."""

    pid: int
    bytes_by_gpu: Mapping[str, int]
    busy_path: Path
    """The process writes this file while it computes."""


def allocate(directory: Path, requested_bytes: Mapping[str, int], pid: int | None = None) -> None:
    """Replaces the process's allocations by `requested_bytes` (UUID -> bytes), on all GPUs or on none.

    Raises:
        OutOfMemoryError: a GPU has too little memory, is lost or does not exist.
    """
    owner_pid = os.getpid() if pid is None else pid
    with _locked(directory):
        free = free_bytes(directory, excluded_pid=owner_pid)
        for uuid, amount in requested_bytes.items():
            if amount > free.get(uuid, 0):
                raise OutOfMemoryError(uuid, amount, free.get(uuid, 0))
        held = {uuid: amount for uuid, amount in requested_bytes.items() if amount > 0}
        record = {"pid": owner_pid, "started": _start_ticks(owner_pid), "bytes": held}
        write_json(directory / "vram" / f"{owner_pid}.json", record)


def free_bytes(directory: Path, excluded_pid: int | None = None) -> dict[str, int]:
    """Free bytes of each GPU that is not lost; `excluded_pid` ignores the allocations of one process."""
    used = used_bytes(directory, excluded_pid)
    lost = lost_gpus(directory)
    return {
        gpu["uuid"]: gpu["memory_total_bytes"] - gpu["memory_reserved_bytes"] - used.get(gpu["uuid"], 0)
        for gpu in read_json(directory / "rig.json").get("gpus", [])
        if gpu["uuid"] not in lost
    }


def used_bytes(directory: Path, excluded_pid: int | None = None) -> dict[str, int]:
    """Used bytes of each GPU, by living processes and by external use."""
    used = external_bytes(directory)
    for allocation in allocations(directory):
        if allocation.pid != excluded_pid:
            for uuid, amount in allocation.bytes_by_gpu.items():
                used[uuid] = used.get(uuid, 0) + amount
    return used


def external_bytes(directory: Path) -> dict[str, int]:
    """Bytes of each GPU that other programs hold: from the start (`rig.json`) and since (`foreign.json`)."""
    held: dict[str, int] = dict(read_json(directory / "foreign.json"))
    for gpu in read_json(directory / "rig.json").get("gpus", []):
        if gpu.get("external_bytes"):
            held[gpu["uuid"]] = held.get(gpu["uuid"], 0) + gpu["external_bytes"]
    return held


def lost_gpus(directory: Path) -> set[str]:
    """UUIDs of the GPUs that are lost: from the start (`rig.json`) or since (`lost.json`)."""
    since = set(read_json(directory / "lost.json"))
    return since | {gpu["uuid"] for gpu in read_json(directory / "rig.json").get("gpus", []) if gpu.get("is_lost")}


def allocations(directory: Path) -> list[Allocation]:
    """Allocations of living processes; records of dead processes are removed."""
    allocated: list[Allocation] = []
    for path in sorted((directory / "vram").glob("*.json")):
        record = read_json(path)
        if not record:
            continue
        if _start_ticks(record["pid"]) != record["started"]:
            path.unlink(missing_ok=True)
            continue
        allocated.append(Allocation(record["pid"], record["bytes"], path.with_suffix(".busy")))
    return allocated


def set_external(directory: Path, uuid: str, amount: int) -> None:
    """Sets the external memory use of a GPU, replacing the earlier value. May overcommit the GPU."""
    with _locked(directory):
        external = dict(read_json(directory / "foreign.json"))
        external[uuid] = amount
        write_json(directory / "foreign.json", {key: value for key, value in external.items() if value > 0})


def set_lost(directory: Path, uuid: str, lost: bool = True) -> None:
    """Marks a GPU as fallen off the bus, or as back."""
    with _locked(directory):
        uuids = set(read_json(directory / "lost.json"))
        uuids = uuids | {uuid} if lost else uuids - {uuid}
        write_json(directory / "lost.json", dict.fromkeys(sorted(uuids), True))


def read_json(path: Path) -> dict[str, Any]:
    """Reads the object in a file; empty if the file is missing or invalid."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def write_json(path: Path, data: Mapping[str, Any] | list[dict[str, object]]) -> None:
    """Writes the file atomically: readers see the old or the new content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    staging.write_text(json.dumps(data), encoding="utf-8")
    staging.replace(path)


@contextlib.contextmanager
def _locked(directory: Path) -> Generator[None]:
    with (directory / "lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _start_ticks(pid: int) -> int | None:
    """Start time of a living process in clock ticks since boot; None for a dead or zombie process (proc(5), stat)."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(rest[18])
