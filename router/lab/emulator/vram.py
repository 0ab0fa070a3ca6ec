"""The memory of EMULATED GPUs, shared by processes through a directory.

`rig.json` names the GPUs; `vram/PID.json` is what a process holds; an allocation is made under one file lock, if it
fits. What a process held is free again as soon as the process is dead (or a zombie): nobody has to clean up. The
standard library only, and little of it, as every emulated runner imports this; it reads no clock and decides nothing.
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
    """The GPU has no room for the allocation; nothing was taken on any GPU."""

    def __init__(self, uuid: str, wanted_bytes: int, free_bytes: int) -> None:
        super().__init__(f"CUDA error: out of memory on {uuid}: {wanted_bytes} bytes wanted, {free_bytes} free")
        self.uuid = uuid
        self.wanted_bytes = wanted_bytes
        self.free_bytes = free_bytes


class Use(NamedTuple):
    """What one process holds."""

    pid: int
    bytes_by_gpu: Mapping[str, int]
    is_busy_path: Path
    """A file that the process touches while it computes."""


def allocate(directory: Path, wanted: Mapping[str, int], pid: int | None = None) -> None:
    """Replaces what the process holds by `wanted` (UUID -> bytes), on all GPUs or on none.

    Raises:
        OutOfMemoryError: a GPU has no room, is lost or does not exist.
    """
    owner = os.getpid() if pid is None else pid
    with _locked(directory):
        free = free_bytes(directory, without=owner)
        for uuid, amount in wanted.items():
            if amount > free.get(uuid, 0):
                raise OutOfMemoryError(uuid, amount, free.get(uuid, 0))
        held = {uuid: amount for uuid, amount in wanted.items() if amount > 0}
        record = {"pid": owner, "started": _started(owner), "bytes": held}
        write_json(directory / "vram" / f"{owner}.json", record)


def free_bytes(directory: Path, without: int | None = None) -> dict[str, int]:
    """Free bytes of each GPU that is not lost; `without` leaves one process's own use out."""
    used = used_bytes(directory, without)
    lost = read_json(directory / "lost.json")
    return {
        gpu["uuid"]: gpu["memory_total_bytes"] - gpu["memory_reserved_bytes"] - used.get(gpu["uuid"], 0)
        for gpu in read_json(directory / "rig.json").get("gpus", [])
        if gpu["uuid"] not in lost
    }


def used_bytes(directory: Path, without: int | None = None) -> dict[str, int]:
    """Bytes in use on each GPU, by living processes and by the outside (`foreign.json`)."""
    used: dict[str, int] = dict(read_json(directory / "foreign.json"))
    for use in uses(directory):
        if use.pid != without:
            for uuid, amount in use.bytes_by_gpu.items():
                used[uuid] = used.get(uuid, 0) + amount
    return used


def uses(directory: Path) -> list[Use]:
    """What each living process holds; records of dead ones are removed."""
    found: list[Use] = []
    for path in sorted((directory / "vram").glob("*.json")):
        record = read_json(path)
        if not record:
            continue
        if _started(record["pid"]) != record["started"]:
            path.unlink(missing_ok=True)
            continue
        found.append(Use(record["pid"], record["bytes"], path.with_suffix(".busy")))
    return found


def set_external(directory: Path, uuid: str, amount: int) -> None:
    """Use of a GPU by something outside the rig; replaces what was said before. It may leave others too little."""
    with _locked(directory):
        external = dict(read_json(directory / "foreign.json"))
        external[uuid] = amount
        write_json(directory / "foreign.json", {key: value for key, value in external.items() if value > 0})


def set_lost(directory: Path, uuid: str, lost: bool = True) -> None:
    """A GPU falls off the bus, or comes back."""
    with _locked(directory):
        names = set(read_json(directory / "lost.json"))
        names = names | {uuid} if lost else names - {uuid}
        write_json(directory / "lost.json", dict.fromkeys(sorted(names), True))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty where there is none or it is not readable."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def write_json(path: Path, data: Mapping[str, Any] | list[dict[str, object]]) -> None:
    """Writes the whole file at once, so that readers see the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    staging.write_text(json.dumps(data), encoding="utf-8")
    staging.replace(path)


@contextlib.contextmanager
def _locked(directory: Path) -> Generator[None]:
    with (directory / "lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _started(pid: int) -> int | None:
    """When a living process started, in clock ticks since boot; None for a dead one or a zombie (proc(5), stat)."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(rest[18])
