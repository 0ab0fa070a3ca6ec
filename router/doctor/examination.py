"""All checks in the order in which they are shown, and the result as a JSON-ready document. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from router.doctor.facts import DoctorFacts
from router.doctor.finding import Check, Finding, Status
from router.doctor.gpu_checks import GPU_CHECKS
from router.doctor.machine_checks import MACHINE_CHECKS
from router.doctor.model_checks import MODEL_CHECKS

CHECKS: tuple[Check, ...] = (*GPU_CHECKS, *MACHINE_CHECKS, *MODEL_CHECKS)


def examine(facts: DoctorFacts) -> tuple[Finding, ...]:
    """One finding for each check."""
    return tuple(Finding(check, tuple(check.examine(facts))) for check in CHECKS)


def verdict(findings: Sequence[Finding]) -> str:
    """`2 failures, 1 warning, 3 not checked, 24 ok`."""
    parts: list[str] = []
    for status, one, many in _COUNTED:
        number = sum(finding.status is status for finding in findings)
        if number:
            parts.append(f"{number} {one if number == 1 else many}")
    return ", ".join(parts)


_COUNTED = (
    (Status.FAILURE, "failure", "failures"),
    (Status.WARNING, "warning", "warnings"),
    (Status.NOTE, "note", "notes"),
    (Status.NOT_CHECKED, "not checked", "not checked"),
    (Status.OK, "ok", "ok"),
)


def as_document(facts: DoctorFacts, findings: Sequence[Finding]) -> dict[str, Any]:
    """The result as JSON; its keys are listed in docs/doctor.md and only ever added to."""
    return {
        "healthy": all(finding.status is not Status.FAILURE for finding in findings),
        "verdict": verdict(findings),
        "emulated": facts.emulated,
        "checks": [
            {
                "id": finding.check.id,
                "title": finding.check.title,
                "status": finding.status.value,
                "why": finding.check.why,
                "outcomes": [
                    {"status": each.status.value, "what": each.what, "command": each.command}
                    for each in finding.outcomes
                ],
            }
            for finding in findings
        ],
    }
