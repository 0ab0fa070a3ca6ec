"""Parses fault descriptions of the command line: `lost@60+30:1`, `hot@60+120=3`, `hang-up@0+600=8`.

The form is `KIND@SECONDS`, then in any order `+SECONDS` (duration), `:NUMBER` (fault_kind GPU or server) and `=AMOUNT`.
`hang-up` changes the sessions of the workload; every other kind becomes a `Fault`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from router.lab.simulator.faults import Fault, FaultKind
from router.lab.simulator.runner import Scenario
from router.lab.simulator.workload import Session, Turn

HANG_UP = "hang-up"
_AMOUNTS = {FaultKind.HOT: 3.0, FaultKind.EXTERNAL: 0.5, FaultKind.SLOW_DISK: 0.2}
"""Default AMOUNT by kind; other kinds take none."""
_HANG_UP_AFTER_SECONDS = 10.0
_NAMES = {kind.value.replace(" ", "-"): kind for kind in FaultKind}
FAULT_KINDS = (*_NAMES, HANG_UP)
_PATTERN = re.compile(r"(?P<kind>[a-z-]+)@(?P<at>[0-9.]+)(?P<rest>(?:[+:=][0-9.]+)*)")
_WHOLE_RUN_SECONDS = 1e9


class FaultError(ValueError):
    """The text describes no fault; the message lists the kinds."""


@dataclass(frozen=True, slots=True)
class HangUpWindow:
    """Clients whose turn is due in this window disconnect if the whole answer takes longer than the limit."""

    from_seconds: float
    to_seconds: float
    hang_up_after_seconds: float

    def apply(self, session: Session) -> Session:
        return replace(session, turns=tuple(self._apply_to_turn(turn) for turn in session.turns))

    def _apply_to_turn(self, turn: Turn) -> Turn:
        is_due = self.from_seconds <= turn.at_seconds < self.to_seconds
        return replace(turn, hang_up_after_seconds=self.hang_up_after_seconds) if is_due else turn


def with_faults(scenario: Scenario, descriptions: Iterable[str]) -> Scenario:
    """Adds the described faults to the scenario.

    Raises:
        FaultError: a description is invalid.
    """
    for description in descriptions:
        parsed = parse(description)
        if isinstance(parsed, Fault):
            scenario = replace(scenario, faults=(*scenario.faults, parsed))
        else:
            scenario = replace(scenario, sessions=tuple(map(parsed.apply, scenario.sessions)))
    return scenario


def parse(description: str) -> Fault | HangUpWindow:
    """Raises FaultError."""
    match = _PATTERN.fullmatch(description)
    kind = match["kind"] if match is not None else ""
    if match is None or kind not in FAULT_KINDS:
        raise FaultError(
            f"fault: {description!r}: expected KIND@SECONDS[+SECONDS][:NUMBER][=AMOUNT]; "
            f"kinds: {', '.join(FAULT_KINDS)}"
        )
    parts = {part[0]: part[1:] for part in re.findall(r"[+:=][0-9.]+", match["rest"])}
    try:
        at, duration = float(match["at"]), float(parts.get("+", _WHOLE_RUN_SECONDS))
        if kind == HANG_UP:
            return HangUpWindow(at, at + duration, float(parts.get("=", _HANG_UP_AFTER_SECONDS)))
        fault_kind = _NAMES[kind]
        amount = float(parts.get("=", _AMOUNTS.get(fault_kind, 1.0)))
        return Fault(at, fault_kind, int(parts.get(":", 0)), amount, 0.0 if fault_kind is FaultKind.DIES else duration)
    except ValueError as error:
        raise FaultError(f"fault: {description!r}: {error}") from error
