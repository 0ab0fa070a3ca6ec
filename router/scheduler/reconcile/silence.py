"""Replicas that hang: all of their clients give up before the server has sent a byte.

Each client that gives up adds the time for which it saw nothing, each moment once; a response that ends resets it. A
replica that was silent for much longer than its slowest request took counts as hanging.
"""

from __future__ import annotations

from router.domain.events import Released
from router.domain.residency import Residency
from router.scheduler.state import FleetState, Silence

_SILENCE_SECONDS = 120.0
"""A replica that was silent for less does not count as hanging: a long prompt may take as long."""
_UNKNOWN_SECONDS = 240.0
"""The same for a replica that has not answered any request yet."""
_SLOWEST_FACTOR = 2.0
"""Against the slowest request so far; one without a stream shows no byte before its end."""


def hangs(fleet: FleetState, replica: Residency, event: Released, now: float) -> bool:
    """Counts the silence of a request whose client gave up. Returns True once it is too long."""
    key = (replica.instance, replica.blob)
    before = fleet.silences.get(key, Silence(0.0, replica.loaded_at))
    if event.first_byte_at is not None:
        before = Silence(0.0, before.until)  # it has answered since
    seconds = before.seconds + max(0.0, now - max(now - event.silent_seconds, before.until))
    fleet.silences[key] = Silence(seconds, now)
    slowest = fleet.slowest_seconds.get(key)
    limit = _UNKNOWN_SECONDS if slowest is None else max(_SILENCE_SECONDS, _SLOWEST_FACTOR * slowest)
    return seconds >= limit
