"""When the loaded models of a server have to be read again. Pure.

While the router loads, unloads or serves on a server, its list is read at every poll. At rest the router knows what is
loaded there, but for what others do and what the server does by itself. That shows in the memory of its GPUs, and is
read at every fifth poll in any case.
"""

from __future__ import annotations

from dataclasses import dataclass

from router.domain.gpu import GpuUuid
from router.domain.instance import InstanceSpec
from router.domain.residency import ResidencyState
from router.domain.snapshot import Snapshot

POLLS_AT_REST = 5
"""A server at rest is read at every fifth poll: what others load is seen within five seconds by default."""
_MEMORY_BYTES = 64 * 1024**2
"""No model takes less on a GPU; other programs' windows and buffers often change by less."""


@dataclass(frozen=True, slots=True)
class Sight:
    """What was known when a server's loaded models were last read."""

    at: float
    used_bytes: tuple[int, ...]
    """Memory in use on each of its GPUs."""


def sight_of(snapshot: Snapshot, spec: InstanceSpec, now: float) -> Sight:
    """What is known now."""
    return Sight(now, tuple(_used_bytes(snapshot, gpu) for gpu in spec.gpus))


def is_due(snapshot: Snapshot, spec: InstanceSpec, last: Sight | None, now: float, poll_seconds: float) -> bool:
    """Returns True if the server has to be read at this poll. `last`: its last reading since it became ready."""
    rest_seconds = POLLS_AT_REST * poll_seconds
    # A poll comes a little early or late; half a poll keeps that from adding another one.
    if last is None or now - last.at >= rest_seconds - poll_seconds / 2 or snapshot.changed_at >= last.at:
        return True
    if any(
        abs(_used_bytes(snapshot, gpu) - before) >= _MEMORY_BYTES
        for gpu, before in zip(spec.gpus, last.used_bytes, strict=True)
    ):
        return True
    return any(
        residency.state is not ResidencyState.READY or residency.in_flight or now - residency.used_at < rest_seconds
        for (instance, _), residency in snapshot.residencies.items()
        if instance == spec.name
    )


def _used_bytes(snapshot: Snapshot, gpu: GpuUuid) -> int:
    found = snapshot.gpus.get(gpu)
    return 0 if found is None else found.memory_used_bytes
