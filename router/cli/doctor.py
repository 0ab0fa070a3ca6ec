"""`llamayard doctor`: examines the machine and the configuration, and names the command that mends each finding.

Changes nothing. Exit code 1 if a check fails; warnings and what could not be checked do not count.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence

from router.app.doctor_facts import gather
from router.cli.configuration import inputs_of, print_problems
from router.cli.exit_codes import EXIT_FAILED, EXIT_MISUSED, EXIT_OK
from router.config.settings import ConfigError
from router.doctor.examination import as_document, examine, verdict
from router.doctor.facts import DoctorFacts
from router.doctor.finding import Finding, Outcome, Status

_WIDTH = 100
_STATUS_WIDTH = len(Status.NOT_CHECKED.value) + 2
_TITLE_WIDTH = 20
_COLOURS = {Status.OK: "32", Status.NOTE: "36", Status.WARNING: "33", Status.FAILURE: "31", Status.NOT_CHECKED: "90"}
"""ANSI codes: green, cyan, yellow, red, grey."""
_WATTS_MAX = 100_000.0


def run(arguments: argparse.Namespace, environment: Mapping[str, str] | None) -> int:
    """The exit code; EXIT_FAILED if a check failed, EXIT_MISUSED if the configuration cannot be read."""
    try:
        inputs = inputs_of(arguments, environment)
        facts = gather(inputs.settings(), inputs.environment, _watts(arguments.power_supply))
    except ConfigError as error:
        print_problems(error.problems)
        return EXIT_MISUSED
    findings = examine(facts)
    if arguments.json:
        print(json.dumps(as_document(facts, findings), indent=2, ensure_ascii=False))
    else:
        print(render(facts, findings, is_verbose=arguments.verbose, has_colours=sys.stdout.isatty()))
    return EXIT_FAILED if any(finding.status is Status.FAILURE for finding in findings) else EXIT_OK


def _watts(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        watts = float(text.upper().removesuffix("W"))
    except ValueError:
        watts = 0.0
    if not 0.0 < watts <= _WATTS_MAX:
        raise ConfigError([f"--power-supply {text}: must be its rating in watts, such as 1600"])
    return watts


def render(facts: DoctorFacts, findings: Sequence[Finding], *, is_verbose: bool, has_colours: bool) -> str:
    """A line for each check, at most 100 columns; below a finding why it matters and the command that mends it.

    `is_verbose`: also why a check that found nothing matters.
    """
    lines = [facts.emulated] if facts.emulated else []
    for finding in findings:
        if finding.status is not Status.NOT_CHECKED:
            lines += _lines(finding, is_verbose=is_verbose, has_colours=has_colours)
    lines += _unchecked_lines(findings, has_colours=has_colours)
    return "\n".join([*lines, "", verdict(findings)])


def _unchecked_lines(findings: Sequence[Finding], *, has_colours: bool) -> Iterator[str]:
    """The checks that were not made, by reason."""
    titles: dict[str, list[str]] = {}
    for finding in findings:
        if finding.status is Status.NOT_CHECKED:
            titles.setdefault(finding.outcomes[0].what, []).append(finding.check.title)
    status = Status.NOT_CHECKED.value.ljust(_STATUS_WIDTH)
    for reason, names in titles.items():
        first, *rest = textwrap.wrap(f"{', '.join(names)}: {reason}", _WIDTH - _STATUS_WIDTH)
        yield f"{_coloured(status, Status.NOT_CHECKED) if has_colours else status}{first}"
        yield from (f"{' ' * _STATUS_WIDTH}{line}" for line in rest)


def _lines(finding: Finding, *, is_verbose: bool, has_colours: bool) -> Iterator[str]:
    title = finding.check.title.ljust(_TITLE_WIDTH)
    indent = " " * (_STATUS_WIDTH + _TITLE_WIDTH)
    for outcome in finding.outcomes:
        status = outcome.status.value.ljust(_STATUS_WIDTH)
        first, *rest = textwrap.wrap(outcome.what, _WIDTH - len(indent)) or [""]
        yield f"{_coloured(status, outcome.status) if has_colours else status}{title}{first}".rstrip()
        yield from (f"{indent}{line}" for line in rest)
        title = " " * _TITLE_WIDTH
        yield from (f"{indent}{line}" for line in _command_lines(outcome))
    if is_verbose or finding.status in (Status.WARNING, Status.FAILURE):
        yield from textwrap.wrap(f"why: {finding.check.why}", _WIDTH, initial_indent=indent, subsequent_indent=indent)


def _command_lines(outcome: Outcome) -> list[str]:
    if not outcome.command or outcome.status is Status.OK:
        return []
    room = _WIDTH - _STATUS_WIDTH - _TITLE_WIDTH
    return textwrap.wrap(f"$ {outcome.command}", room, subsequent_indent="  ", break_on_hyphens=False)


def _coloured(text: str, status: Status) -> str:
    return f"\x1b[{_COLOURS[status]}m{text}\x1b[0m"
