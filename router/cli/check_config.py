"""`llamayard check-config`: prints every key's effective value and origin, or every problem, and a verdict.

Reads the configuration and, to check it, TLS files, the installed models and the GPUs. Starts and changes nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from router.app.preflight import PreflightResult, check_machine
from router.app.startup_checks import startup_problems
from router.cli.configuration import ConfigurationInputs, inputs_of, print_problems
from router.cli.exit_codes import EXIT_MISUSED, EXIT_OK
from router.config.instance_options import tuning_problems
from router.config.keys import dotted_keys
from router.config.problems import origin_of
from router.config.settings import ConfigError, Settings, key_origins, load_settings
from router.config.values import json_value


@dataclass(frozen=True, slots=True)
class Report:
    """What was found. `keys` is empty if the configuration cannot be read."""

    file: Path | None = None
    errors: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ()
    keys: Mapping[str, EffectiveKey] = field(default_factory=dict[str, "EffectiveKey"])

    @property
    def verdict(self) -> str:
        """`configuration is valid, 2 warnings`, or `3 errors, 1 warning`."""
        warnings = f", {_count(len(self.warnings), 'warning')}" if self.warnings else ""
        return f"{_count(len(self.errors), 'error') if self.errors else 'configuration is valid'}{warnings}"


@dataclass(frozen=True, slots=True)
class EffectiveKey:
    """A key with its JSON-ready value and where it was set."""

    value: object
    origin: str
    is_default: bool
    """Whether the value is that of the default, wherever it was set."""


def run(arguments: argparse.Namespace, environment: Mapping[str, str] | None) -> int:
    """The exit code; EXIT_MISUSED if the configuration cannot be used."""
    try:
        report = check(inputs_of(arguments, environment))
    except ConfigError as error:
        report = Report(errors=tuple(error.problems))
    if arguments.json:
        print(json.dumps(as_document(report, changed=arguments.changed), indent=2, ensure_ascii=False))
    else:
        print_problems(report.errors)
        print_problems(f"warning: {warning}" for warning in report.warnings)
        print("\n".join([*([] if report.errors else _lines(report, changed=arguments.changed)), report.verdict]))
    return EXIT_MISUSED if report.errors else EXIT_OK


def check(inputs: ConfigurationInputs) -> Report:
    """Reads the configuration and checks it on this machine.

    Raises:
        ConfigError: it cannot be read, or keys have wrong values.
    """
    settings = inputs.settings()
    problems = [*tuning_problems(settings), *startup_problems(settings)]
    preflight = PreflightResult() if problems else check_machine(settings, inputs.environment)
    return Report(
        inputs.path,
        (*problems, *preflight.problems),
        preflight.warnings,
        preflight.unchecked,
        _effective_keys(inputs, settings),
    )


def as_document(report: Report, *, changed: bool) -> dict[str, object]:
    """The report as JSON: `valid`, `verdict`, `file`, `errors`, `warnings`, `unchecked`, `keys`."""
    return {
        "valid": not report.errors,
        "verdict": report.verdict,
        "file": None if report.file is None else str(report.file),
        "errors": list(report.errors),
        "warnings": list(report.warnings),
        "unchecked": list(report.unchecked),
        "keys": {name: {"value": key.value, "origin": key.origin} for name, key in _shown(report, changed=changed)},
    }


def _lines(report: Report, *, changed: bool) -> list[str]:
    return [
        f"# file: {report.file or 'none'}",
        *(
            f"{name} = {json.dumps(key.value, ensure_ascii=False)}  # {key.origin}"
            for name, key in _shown(report, changed=changed)
        ),
        *(f"# not checked: {subject}" for subject in report.unchecked),
    ]


def _shown(report: Report, *, changed: bool) -> list[tuple[str, EffectiveKey]]:
    return [(name, key) for name, key in report.keys.items() if not (changed and key.is_default)]


def _effective_keys(inputs: ConfigurationInputs, settings: Settings) -> dict[str, EffectiveKey]:
    origins = key_origins(inputs.path, inputs.environment, inputs.flags)
    home = {name: value for name, value in inputs.environment.items() if name in ("HOME", "XDG_STATE_HOME")}
    defaults = load_settings(None, home)
    keys: dict[str, EffectiveKey] = {}
    for name in dotted_keys(Settings):
        value = json_value(settings, name)
        keys[name] = EffectiveKey(value, origin_of(name, origins) or "default", value == json_value(defaults, name))
    return keys


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
