"""What shall go wrong in a run, in the words of a command line: `lost@60+30:1`, `hot@60+120=3`, `hang-up@0+600=8`.

`KIND@SECONDS`, then in any order `+SECONDS` (how long), `:NUMBER` (which GPU or server) and `=AMOUNT`. Clients that
hang up are part of the workload, so they change the sessions; everything else is a `Fault`. It carries nothing out.
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
"""What AMOUNT is where it is left out; other kinds have none."""
_HANG_UP_AFTER_SECONDS = 10.0
_NAMES = {kind.value.replace(" ", "-"): kind for kind in FaultKind}
FAULT_KINDS = (*_NAMES, HANG_UP)
_FORM = re.compile(r"(?P<kind>[a-z-]+)@(?P<at>[0-9.]+)(?P<rest>(?:[+:=][0-9.]+)*)")
_UNTIL_THE_END_SECONDS = 1e9


class FaultError(ValueError):
    """What is asked for is no fault; says what is."""


@dataclass(frozen=True, slots=True)
class HangUpWindow:
    """Clients whose request falls due in this time leave when their answer takes longer than their patience."""

    from_seconds: float
    to_seconds: float
    hang_up_after_seconds: float

    def of(self, session: Session) -> Session:
        return replace(session, turns=tuple(self._of(turn) for turn in session.turns))

    def _of(self, turn: Turn) -> Turn:
        is_due = self.from_seconds <= turn.at_seconds < self.to_seconds
        return replace(turn, hang_up_after_seconds=self.hang_up_after_seconds) if is_due else turn


def with_faults(scenario: Scenario, words: Iterable[str]) -> Scenario:
    """The scenario in which that goes wrong too.

    Raises:
        FaultError: words that are no fault.
    """
    for each in words:
        found = parse(each)
        if isinstance(found, Fault):
            scenario = replace(scenario, faults=(*scenario.faults, found))
        else:
            scenario = replace(scenario, sessions=tuple(map(found.of, scenario.sessions)))
    return scenario


def parse(words: str) -> Fault | HangUpWindow:
    """Raises FaultError."""
    match = _FORM.fullmatch(words)
    kind = match["kind"] if match is not None else ""
    if match is None or kind not in FAULT_KINDS:
        raise FaultError(
            f"fault: {words!r} is none: KIND@SECONDS[+SECONDS][:NUMBER][=AMOUNT], of {', '.join(FAULT_KINDS)}"
        )
    parts = {part[0]: part[1:] for part in re.findall(r"[+:=][0-9.]+", match["rest"])}
    try:
        at, lasts = float(match["at"]), float(parts.get("+", _UNTIL_THE_END_SECONDS))
        if kind == HANG_UP:
            return HangUpWindow(at, at + lasts, float(parts.get("=", _HANG_UP_AFTER_SECONDS)))
        which = _NAMES[kind]
        amount = float(parts.get("=", _AMOUNTS.get(which, 1.0)))
        return Fault(at, which, int(parts.get(":", 0)), amount, 0.0 if which is FaultKind.DIES else lasts)
    except ValueError as error:
        raise FaultError(f"fault: {words!r}: {error}") from error
