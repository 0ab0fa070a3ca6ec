"""When time alone changes something: what expires, what is late, who has waited long enough."""

from __future__ import annotations

from router.core.entities import Residency, ResidencyState
from router.core.plans import next_timeout
from router.core.state import FleetState
from router.core.waitqueue import WaitQueue


def next_wake(fleet: FleetState, queue: WaitQueue, look_again_at: float) -> float | None:
    """When the dispatcher must look again although nothing happens; None for never."""
    times = [r.expires_at for r in fleet.residencies.values() if r.expires_at is not None and can_expire(r, queue)]
    timeout = next_timeout(fleet)
    if timeout is not None:
        times.append(timeout)
    if len(queue):
        # Waiting tickets look again now and then: drains begin and failures are forgotten by time alone.
        times += [queue.next_deadline() or float("inf"), look_again_at]
    return min(times, default=None)


def can_expire(residency: Residency, queue: WaitQueue) -> bool:
    """True where time alone has it unloaded: idle and not waited for, or an unload to be sent again."""
    leaves = residency.state is ResidencyState.UNLOADING
    return leaves or (residency.is_idle and not queue.waits_for(residency.blob))
