"""`llamayard init`: asks at most four questions and writes a configuration for the GPUs that it finds.

The file is checked as `check-config` checks it before it takes its place; one that cannot be used is not written.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from router.app.access_keys import has_keys
from router.app.machine_survey import MachineSurvey, models_in, survey
from router.cli.check_config import check
from router.cli.configuration import ConfigurationInputs, print_problems
from router.cli.exit_codes import EXIT_FAILED, EXIT_MISUSED, EXIT_OK
from router.cli.first_configuration import GIB, Choices, configuration_text
from router.config.inputs import ConfigError, absolute, home_of, process_environment
from router.config.settings import load_settings
from router.domain.model_names import shortest

DEFAULT_FILE = Path("llamayard.yaml")
_MODELS_SHOWN = 8
_Answer = TypeVar("_Answer")
Ask = Callable[[str, str], str]
"""Question and default -> answer; the default for an empty line."""


@dataclass(frozen=True, slots=True)
class _Preset:
    """What the command line says already; no question is asked about it."""

    port: str | None
    rig: str | None


def run(arguments: argparse.Namespace, environment: Mapping[str, str] | None) -> int:
    """The exit code: EXIT_MISUSED if the answers cannot be used, EXIT_FAILED if the file cannot be written."""
    environment = process_environment() if environment is None else environment
    path, preset = arguments.config or DEFAULT_FILE, _Preset(arguments.port, arguments.rig)
    is_asked = not (arguments.yes or arguments.json)
    try:
        _refuse(path, force=arguments.force, is_asked=is_asked)
        defaults = load_settings(None, environment, {} if preset.rig is None else {"rig": preset.rig})
        found = survey(defaults, environment)
        if not arguments.json:
            print("\n".join(found_lines(found, preset.rig)), flush=True)
        choices = ask_choices(found, preset, _ask if is_asked else (lambda _, default: default), environment)
        text = configuration_text(choices, found.gpus, found.no_gpus_reason)
        warnings = _write_checked(path, text, environment)
    except ConfigError as error:
        print_problems(error.problems)
        return EXIT_MISUSED
    except OSError as error:
        print_problems([f"{path}: cannot be written: {error.strerror or error}"])
        return EXIT_FAILED
    print_problems(f"warning: {warning}" for warning in warnings)
    needs_key = choices.for_others and not has_keys(load_settings(path, environment))
    commands = _next_commands(arguments.config, needs_key=needs_key)
    if arguments.json:
        print(json.dumps(_document(path, found, choices, commands), indent=2, ensure_ascii=False))
    else:
        print("\n".join([f"wrote {path}; next:", *(f"  {command}" for command in commands)]))
    return EXIT_OK


def _refuse(path: Path, *, force: bool, is_asked: bool) -> None:
    if path.exists() and not force:
        raise ConfigError([f"{path} exists: --force writes over it, --config FILE writes another"])
    if is_asked and not sys.stdin.isatty():
        raise ConfigError(["standard input is no terminal, so nothing can be asked: --yes takes the defaults"])


def _ask(question: str, default: str) -> str:
    try:
        return input(f"{question} [{default or 'none'}]: ").strip() or default
    except EOFError:
        raise ConfigError(["no answer: nothing was written"]) from None


def found_lines(found: MachineSurvey, rig: str | None) -> Iterator[str]:
    """What was found, at most 100 columns."""
    yield f"EMULATED rig {rig}" if rig is not None else f"GPUs: {len(found.gpus) or f'none ({found.no_gpus_reason})'}"
    for gpu in found.gpus:
        yield f"  {gpu.index}: {gpu.name}, {gpu.memory_total_bytes / GIB:.1f} GiB"
    if found.ollama_problem:
        yield f"Ollama: {found.ollama_problem}"
    if found.stock_service:
        yield f"Ollama: {found.stock_service}; it holds memory of the GPUs for its models:"
        yield "  sudo systemctl disable --now ollama"
    if found.port_holder:
        yield f"default port: taken by {found.port_holder}"


def ask_choices(found: MachineSurvey, preset: _Preset, ask: Ask, environment: Mapping[str, str]) -> Choices:
    """Asks what the command line does not say.

    Raises:
        ConfigError: an answer cannot be used.
    """
    port = (
        _port(preset.port)
        if preset.port
        else _asked(ask, "Port for clients (Ollama's own is 11434)", str(found.free_port), _port)
    )
    for_others = _asked(ask, "May other machines use it, with access keys? (yes/no)", "no", _yes_or_no)
    store, models = found.store, found.models
    if preset.rig is None:
        store = absolute(Path(ask("Folder of the models", str(found.store))), home_of(environment))
        models = models if store == found.store else tuple(models_in(store))
    warm = _asked(ask, _warm_question(models), "", lambda text: _model(text, models)) if models else ""
    return Choices(port, for_others, store if preset.rig is None else None, warm, preset.rig)


def _asked(ask: Ask, question: str, default: str, read: Callable[[str], _Answer]) -> _Answer:
    """The answer, asked for until it can be used.

    Raises:
        ConfigError: not even the default can be used.
    """
    while True:
        answer = ask(question, default)
        try:
            return read(answer)
        except ConfigError as error:
            if answer == default:
                raise
            print_problems(error.problems)


def _warm_question(models: tuple[str, ...]) -> str:
    shown = ", ".join(models[:_MODELS_SHOWN]) + (", …" if len(models) > _MODELS_SHOWN else "")
    return f"A model to keep loaded at all times ({shown})"


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 <= int(text) <= 65535):
        raise ConfigError([f"port {text}: must be a number from 0 to 65535"])
    return int(text)


def _yes_or_no(text: str) -> bool:
    if text.lower() not in ("y", "yes", "n", "no"):
        raise ConfigError([f"{text}: answer yes or no"])
    return text.lower().startswith("y")


def _model(text: str, models: tuple[str, ...]) -> str:
    if text in ("", "none"):
        return ""
    try:
        name = shortest(text)
    except ValueError as error:
        raise ConfigError([f"{text}: {error}"]) from error
    if name not in models:
        raise ConfigError([f"{name} is not among the models: {', '.join(models)}"])
    return name


def _write_checked(path: Path, text: str, environment: Mapping[str, str]) -> tuple[str, ...]:
    """Writes the file if its configuration can be used; returns warnings.

    Raises:
        ConfigError: it cannot.
        OSError: the file cannot be written.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    draft = Path(name)
    try:
        os.close(descriptor)
        with draft.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.chmod(0o644)
        # Other machines need access keys, which are made next: that alone is not yet a problem.
        report = check(ConfigurationInputs(draft, environment, {"server.host": "127.0.0.1"}))
        if report.errors:
            raise ConfigError([*report.errors, "nothing was written"])
        draft.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            draft.unlink()
    return report.warnings


def _next_commands(given: Path | None, *, needs_key: bool) -> list[str]:
    config = "" if given is None else f" --config {given}"
    keys = [f"llamayard keys create NAME{config}"] if needs_key else []
    return [*keys, f"llamayard doctor{config}", f"llamayard serve{config}"]


def _document(path: Path, found: MachineSurvey, choices: Choices, commands: list[str]) -> dict[str, object]:
    return {
        "file": str(path),
        "gpus": [{"index": gpu.index, "name": gpu.name, "uuid": gpu.uuid} for gpu in found.gpus],
        "stock_service": found.stock_service,
        "port": choices.port,
        "port_holder": found.port_holder,
        "store": None if choices.store is None else str(choices.store),
        "keep_warm": choices.warm or None,
        "next": commands,
    }
