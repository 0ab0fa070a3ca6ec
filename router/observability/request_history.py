"""Remembers what became of the latest requests that asked for a slot, for `llamayard why`. Bounded; nothing is decided.

Observes the controller. A request appears once for each time that it asked: again after a retry or with a fallback.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from router.domain.actions import (
    AbortLoad,
    Action,
    Grant,
    Load,
    Reject,
    RestartInstance,
    StartInstance,
    StopInstance,
    Unload,
)
from router.domain.events import Arrived, Cancelled, Event, LoadFailed, LoadFinished, Released
from router.domain.ids import LoadId
from router.domain.request import TicketId

REQUESTS_MAX = 2048
"""Requests that are remembered: some minutes of a busy team."""
_STEPS_MAX = 1024
_SHOWN_STEPS_MAX = 50


class Ending(StrEnum):
    WAITING = "waiting"
    GRANTED = "granted"
    REJECTED = "rejected"
    CANCELLED = "cancelled"
    """Its client went away while it waited."""


@dataclass(slots=True)
class RequestTrace:
    """One time that a request asked for a slot. Times are the controller's seconds."""

    ticket_id: TicketId
    request_id: str
    model: str
    arrived_at: float
    answer: Grant | Reject | None = None
    ended_at: float | None = None
    """When it was granted, rejected or cancelled."""
    released: Released | None = None
    released_at: float | None = None
    """When its slot was free again."""

    @property
    def ending(self) -> Ending:
        if isinstance(self.answer, Grant):
            return Ending.GRANTED
        if self.answer is not None:
            return Ending.REJECTED
        return Ending.WAITING if self.ended_at is None else Ending.CANCELLED


@dataclass(frozen=True, slots=True)
class Step:
    """What the scheduler did at some time: a load, an unload, a start or a stop."""

    at: float
    event: str
    model: str
    instance: str
    reason: str


class RequestHistory:
    """The latest requests and steps."""

    def __init__(self) -> None:
        self._ring: list[RequestTrace | None] = [None] * REQUESTS_MAX
        """By ticket id, modulo its length: ids count up."""
        self._steps: deque[Step] = deque(maxlen=_STEPS_MAX)
        self._loads: dict[LoadId, Load] = {}

    def observe(self, event: Event, actions: list[Action], now: float) -> None:
        """Takes note of one event and the actions that followed from it."""
        if isinstance(event, Arrived):
            ticket = event.ticket
            trace = RequestTrace(ticket.id, ticket.request_id, ticket.model.name, now)
            self._ring[ticket.id % REQUESTS_MAX] = trace
        elif isinstance(event, Released):
            trace = self._ring[event.ticket_id % REQUESTS_MAX]
            if trace is not None and trace.ticket_id == event.ticket_id:
                trace.released, trace.released_at = event, now
        else:
            self._other(event, now)
        for action in actions:
            if isinstance(action, Grant | Reject):
                self._ended(action.ticket_id, action, now)
            else:
                self._acted(action, now)

    def find(self, request_id: str) -> list[RequestTrace]:
        """All that is remembered of a request, in the order of asking."""
        found = [trace for trace in self._ring if trace is not None and trace.request_id == request_id]
        return sorted(found, key=lambda trace: trace.ticket_id)

    def meanwhile(self, trace: RequestTrace) -> list[Step]:
        """What was done while the request waited; of much the latest."""
        until = float("inf") if trace.ended_at is None else trace.ended_at
        return [step for step in self._steps if trace.arrived_at <= step.at <= until][-_SHOWN_STEPS_MAX:]

    def latest_steps(self, count: int) -> list[Step]:
        """What was done last, oldest first."""
        return list(self._steps)[-count:]

    def _ended(self, ticket_id: TicketId, answer: Grant | Reject | None, now: float) -> None:
        trace = self._ring[ticket_id % REQUESTS_MAX]
        if trace is not None and trace.ticket_id == ticket_id:
            trace.answer, trace.ended_at = answer, now

    def _other(self, event: Event, now: float) -> None:
        match event:
            case Cancelled():
                self._ended(event.ticket_id, None, now)
            case LoadFinished() | LoadFailed():
                load = self._loads.pop(event.load_id, None)
                if load is not None:
                    name = "load failed" if isinstance(event, LoadFailed) else "loaded"
                    reason = event.message if isinstance(event, LoadFailed) else ""
                    self._steps.append(Step(now, name, load.model.name, load.instance, reason))
            case _:
                pass

    def _acted(self, action: Action, now: float) -> None:
        if isinstance(action, Load):
            self._loads[action.load_id] = action
        elif isinstance(action, AbortLoad):
            self._loads.pop(action.load_id, None)  # no event tells of its end
        self._steps.extend(_steps_of(action, now))


def _steps_of(action: Action, now: float) -> Iterator[Step]:
    match action:
        case Load():
            yield Step(now, "load", action.model.name, action.instance, action.reason)
        case Unload():
            yield Step(now, "unload", action.model.name, action.instance, action.reason)
        case StartInstance():
            yield Step(now, "start instance", "", action.spec.name, action.reason)
        case StopInstance():
            yield Step(now, "stop instance", "", action.instance, action.reason)
        case RestartInstance():
            yield Step(now, "restart instance", "", action.instance, action.reason)
        case _:
            pass
