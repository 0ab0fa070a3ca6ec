"""The lifecycle of an instance: its states, the transitions between them, and when to give up. Pure.

`TABLE` alone defines the possible transitions: the supervisor follows it, and the diagram in the documentation is
generated from it. There is no clock and no process here: uptimes and jitter are passed in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from router.domain.instance import InstanceState


class Trigger(StrEnum):
    """What can happen to an instance, or be requested of it."""

    START = "start"
    """A start was requested, or the wait after a failure is over."""
    ANSWERED = "answered"
    """It answers its health check and has reported the GPUs that it was given."""
    FAILED = "failed"
    """It died, could not start, or stopped answering; it will be started again."""
    GAVE_UP = "gave up"
    """It failed too often; it stays down until a start is requested."""
    DRAIN = "drain"
    """Takes no new request; running ones may end."""
    STOP = "stop"
    EXITED = "exited"
    """Its process group is gone, as requested or because it is no longer needed."""


_S = InstanceState
_T = Trigger

TABLE: Mapping[tuple[InstanceState, Trigger], InstanceState] = MappingProxyType(
    {
        (_S.STOPPED, _T.START): _S.STARTING,
        (_S.STARTING, _T.ANSWERED): _S.READY,
        (_S.STARTING, _T.FAILED): _S.BACKOFF,
        (_S.STARTING, _T.GAVE_UP): _S.FATAL,
        (_S.STARTING, _T.STOP): _S.STOPPING,
        (_S.READY, _T.FAILED): _S.BACKOFF,
        (_S.READY, _T.GAVE_UP): _S.FATAL,
        (_S.READY, _T.DRAIN): _S.DRAINING,
        (_S.READY, _T.STOP): _S.STOPPING,
        (_S.DRAINING, _T.STOP): _S.STOPPING,
        (_S.DRAINING, _T.EXITED): _S.STOPPED,
        (_S.STOPPING, _T.EXITED): _S.STOPPED,
        (_S.BACKOFF, _T.START): _S.STARTING,
        (_S.BACKOFF, _T.ANSWERED): _S.READY,
        (_S.BACKOFF, _T.STOP): _S.STOPPED,
        (_S.FATAL, _T.START): _S.STARTING,
        (_S.FATAL, _T.STOP): _S.STOPPED,
    }
)
"""(state, trigger) -> next state; absent pairs are impossible. `BACKOFF` with `ANSWERED` is an attached server that
came back: the router did not start it, so it was never `STARTING`."""


class ImpossibleMove(AssertionError):
    """A trigger that has no transition from the current state: a bug in the caller, never caught."""


def can_move(state: InstanceState, trigger: Trigger) -> bool:
    return (state, trigger) in TABLE


def next_state(state: InstanceState, trigger: Trigger) -> InstanceState:
    """The state after the trigger.

    Raises:
        ImpossibleMove: the table has no such transition.
    """
    found = TABLE.get((state, trigger))
    if found is None:
        possible = ", ".join(sorted(t for s, t in TABLE if s is state))
        raise ImpossibleMove(f"an instance in state {state} cannot move by '{trigger}'; it can by: {possible}")
    return found


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """When a failing instance is started again, and when it is given up."""

    first_wait_seconds: float = 1.0
    factor: float = 2.0
    wait_limit_seconds: float = 60.0
    quick_death_seconds: float = 30.0
    """A shorter time in READY counts as a quick death. A server that never became READY was there for 0 s."""
    quick_deaths_max: int = 5
    """Number of quick deaths in a row that makes the instance FATAL."""

    def __post_init__(self) -> None:
        if self.first_wait_seconds < 0 or self.wait_limit_seconds < self.first_wait_seconds:
            raise ValueError("first_wait_seconds must be at least 0 and at most wait_limit_seconds")
        if self.factor < 1:
            raise ValueError("factor must be at least 1, or waits would shrink")
        if self.quick_deaths_max < 1:
            raise ValueError("quick_deaths_max must be at least 1")


def quick_deaths_after(quick_deaths: int, ready_seconds: float, policy: RestartPolicy) -> int:
    """The number of quick deaths in a row after another death, which came `ready_seconds` after READY."""
    return quick_deaths + 1 if ready_seconds < policy.quick_death_seconds else 0


def is_fatal(quick_deaths: int, policy: RestartPolicy) -> bool:
    return quick_deaths >= policy.quick_deaths_max


def wait_seconds(quick_deaths: int, policy: RestartPolicy, jitter_ratio: float = 0.0) -> float:
    """Seconds to wait before the next start: `first * factor ** (quick deaths - 1)`, capped, times 1 + `jitter_ratio`.

    `jitter_ratio` is a random number in [0, 1), drawn by the caller. It is applied after the cap.
    """
    wait, limit = policy.first_wait_seconds, policy.wait_limit_seconds
    for _ in range(quick_deaths - 1):
        if wait >= limit or wait == 0 or policy.factor == 1:
            break
        wait *= policy.factor
    return min(wait, limit) * (1.0 + jitter_ratio)


def state_diagram() -> str:
    """The table as a mermaid state diagram: one arrow per transition, in the order of the table."""
    arrows = [f"    {source} --> {target}: {trigger}" for (source, trigger), target in TABLE.items()]
    return "\n".join(["stateDiagram-v2", f"    [*] --> {InstanceState.STOPPED}", *arrows]) + "\n"
