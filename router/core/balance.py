"""Which loaded copy of a model serves the next request.

Filter (it can serve now), then fewest requests in flight; ties go to the one used longest ago, then by name, so
that equal copies take turns and the same facts always give the same answer.
"""

from __future__ import annotations

from collections.abc import Iterable

from router.core.entities import InstanceState, Residency, ResidencyState, RunnerOptions, Snapshot


def can_serve(snapshot: Snapshot, residency: Residency, options: RunnerOptions) -> bool:
    """True where a request with these runner options starts at once, with no reload and no waiting inside Ollama."""
    view = snapshot.instances.get(residency.instance)
    return (
        view is not None
        and view.state is InstanceState.READY
        and residency.state is ResidencyState.READY
        and residency.options == options
        and residency.in_flight < residency.slots
        and (residency.instance, residency.blob) not in snapshot.draining
    )


def pick(candidates: Iterable[Residency]) -> Residency | None:
    """The copy with the fewest requests in flight, or None where there is none."""
    return min(candidates, key=lambda r: (r.in_flight, r.used_at, r.instance), default=None)
