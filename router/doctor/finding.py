"""A check, and what it found: a status, what was seen, and the command that mends it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum

from router.doctor.facts import DoctorFacts


class Status(StrEnum):
    """From good to bad, but for the last."""

    OK = "ok"
    NOTE = "note"
    """True of this machine and good to know; nothing is wrong."""
    WARNING = "warning"
    """Works, but slower, riskier or less than it could."""
    FAILURE = "failure"
    """Does not work, or will break."""
    NOT_CHECKED = "not checked"
    """The facts could not be read."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a check found. `command` mends it, or shows more; "" if there is none."""

    status: Status
    what: str
    command: str = ""


@dataclass(frozen=True, slots=True)
class Check:
    """One check: a pure function of the facts, with its name and why it matters."""

    id: str
    """Stable, for scripts."""
    title: str
    why: str
    examine: Callable[[DoctorFacts], list[Outcome]]
    """The outcomes, at least one; of several subjects, only those that are not OK."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A check with its outcomes."""

    check: Check
    outcomes: tuple[Outcome, ...]

    @property
    def status(self) -> Status:
        """The worst of the outcomes; NOT_CHECKED only if nothing else is known."""
        return min((outcome.status for outcome in self.outcomes), key=_BADNESS.index)


_BADNESS = (Status.FAILURE, Status.WARNING, Status.NOTE, Status.NOT_CHECKED, Status.OK)


def ok(what: str) -> list[Outcome]:
    return [Outcome(Status.OK, what)]


def note(what: str, command: str = "") -> Outcome:
    return Outcome(Status.NOTE, what, command)


def warning(what: str, command: str = "") -> Outcome:
    return Outcome(Status.WARNING, what, command)


def failure(what: str, command: str = "") -> Outcome:
    return Outcome(Status.FAILURE, what, command)


def not_checked(reason: str) -> list[Outcome]:
    return [Outcome(Status.NOT_CHECKED, reason)]


def or_ok(found: Iterable[Outcome], what: str) -> list[Outcome]:
    """The outcomes, or OK if there is none."""
    return list(found) or ok(what)
