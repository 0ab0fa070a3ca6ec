"""The life of an instance: its states, what moves it between them, and when to give up. Pure data and functions.

`TABLE` is the only place that says which move is possible; the supervisor asks it, the documentation is drawn from it.
Knows no clock and no process: how long a server lived, and any jitter, are passed in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from router.domain.instance import InstanceState


class Trigger(StrEnum):
    """What can happen to an instance, or be asked of it."""

    START = "start"
    """Asked for, or the wait after a failure is over."""
    ANSWERED = "answered"
    """Answers `/api/version` and reported the GPUs that it was given."""
    FAILED = "failed"
    """Died, could not start, or stopped answering; to be tried again."""
    GAVE_UP = "gave up"
    """Failed once too often; stays down until it is asked to start."""
    DRAIN = "drain"
    """Takes no new request; running ones may end."""
    STOP = "stop"
    EXITED = "exited"
    """Its process group is gone, and it was meant to be, or nobody wants it any more."""


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
"""State x trigger -> state; a pair that is absent is impossible. `BACKOFF` with `ANSWERED` is an attached server that
came back by itself: nothing was started, so it never was `STARTING`."""


class ImpossibleMove(AssertionError):
    """A trigger in a state that has no such move: a mistake in the caller, never caught to go on."""


def can_move(state: InstanceState, trigger: Trigger) -> bool:
    return (state, trigger) in TABLE


def next_state(state: InstanceState, trigger: Trigger) -> InstanceState:
    """Where the trigger leads from this state; ImpossibleMove where the table has no such move."""
    found = TABLE.get((state, trigger))
    if found is None:
        possible = ", ".join(sorted(t for s, t in TABLE if s is state))
        raise ImpossibleMove(f"an instance in state {state} cannot move by '{trigger}'; it can by: {possible}")
    return found


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """How patiently a failing instance is started again."""

    first_wait_seconds: float = 1.0
    factor: float = 2.0
    wait_limit_seconds: float = 60.0
    quick_death_seconds: float = 30.0
    """A life in READY shorter than this counts as a quick death; one that never got there lived 0 s."""
    quick_deaths_max: int = 5
    """So many quick deaths in a row, and it is FATAL."""

    def __post_init__(self) -> None:
        if self.first_wait_seconds < 0 or self.wait_limit_seconds < self.first_wait_seconds:
            raise ValueError("first_wait_seconds must be at least 0 and at most wait_limit_seconds")
        if self.factor < 1:
            raise ValueError("factor must be at least 1, or waits would shrink")
        if self.quick_deaths_max < 1:
            raise ValueError("quick_deaths_max must be at least 1")


def quick_deaths_after(quick_deaths: int, ready_seconds: float, policy: RestartPolicy) -> int:
    """The number of quick deaths in a row, after one more death that followed `ready_seconds` in READY."""
    return quick_deaths + 1 if ready_seconds < policy.quick_death_seconds else 0


def is_fatal(quick_deaths: int, policy: RestartPolicy) -> bool:
    return quick_deaths >= policy.quick_deaths_max


def wait_seconds(quick_deaths: int, policy: RestartPolicy, jitter_ratio: float = 0.0) -> float:
    """How long to wait before the next start: `first * factor ** (quick deaths - 1)`, capped, then stretched by jitter.

    `jitter_ratio` in [0, 1) is drawn by the caller; the wait grows by that part of itself, the cap with it.
    """
    wait, limit = policy.first_wait_seconds, policy.wait_limit_seconds
    for _ in range(quick_deaths - 1):
        if wait >= limit or wait == 0 or policy.factor == 1:
            break
        wait *= policy.factor
    return min(wait, limit) * (1.0 + jitter_ratio)


def state_diagram() -> str:
    """The table as a mermaid state diagram, one arrow a move, in the table's order."""
    arrows = [f"    {source} --> {target}: {trigger}" for (source, trigger), target in TABLE.items()]
    return "\n".join(["stateDiagram-v2", f"    [*] --> {InstanceState.STOPPED}", *arrows]) + "\n"
