"""When the dispatcher has to act by time alone: expiries, timeouts, deadlines and retries."""

from __future__ import annotations

from collections.abc import Iterator

from router.domain.residency import Residency, ResidencyState
from router.scheduler.queue.wait_queue import WaitQueue
from router.scheduler.reconcile.reservations import next_timeout
from router.scheduler.state import FleetState


def next_wake(fleet: FleetState, queue: WaitQueue, retry_at: float) -> float | None:
    """When the dispatcher has to run even without an event; None for never. `retry_at`: next search of the queue."""
    times = [*_expiries(fleet, queue), *fleet.restarts_due.values()]
    if fleet.rolling is not None:
        times.append(fleet.rolling.deadline)
    if fleet.ejection_ends_at is not None:
        times.append(fleet.ejection_ends_at)
    timeout = next_timeout(fleet)
    if timeout is not None:
        times.append(timeout)
    if queue.tickets:
        # Waiting tickets retry regularly, because drains begin and failures are dropped by time alone.
        times += [queue.next_deadline() or float("inf"), retry_at]
    return min(times, default=None)


def _expiries(fleet: FleetState, queue: WaitQueue) -> Iterator[float]:
    """When replicas expire. Reads `fleet.uses` directly, so that it is not written into the residencies."""
    for key, replica in fleet.replicas.items():
        use = fleet.uses.get(key) or replica
        if use.expires_at is not None and _can_expire(replica, use.in_flight, queue):
            yield use.expires_at


def can_expire(residency: Residency, queue: WaitQueue) -> bool:
    """Returns True if time alone can unload it: idle and not waited for, or a failed unload to be sent again."""
    return _can_expire(residency, residency.in_flight, queue)


def _can_expire(residency: Residency, in_flight: int, queue: WaitQueue) -> bool:
    if residency.state is ResidencyState.UNLOADING:
        return True
    return residency.state is ResidencyState.READY and not in_flight and not queue.waits_for(residency.blob)
