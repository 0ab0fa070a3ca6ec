"""`llamayard serve`: runs the router until a signal stops it. Only this module uses uvloop."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping

import uvloop

from router.app.serve import serve
from router.app.startup_checks import startup_problems
from router.cli.configuration import inputs_of, print_problems
from router.cli.exit_codes import EXIT_MISUSED, EXIT_OK
from router.config.instance_options import tuning_problems
from router.config.settings import ConfigError, Settings


def run(arguments: argparse.Namespace, environment: Mapping[str, str] | None, auto_rig: str) -> int:
    """Serves until a signal; returns EXIT_MISUSED if the configuration cannot be used on this machine."""
    try:
        inputs = inputs_of(arguments, environment)

        def read_settings(*, may_be_blank: bool = True) -> Settings:
            settings = inputs.settings(may_be_blank=may_be_blank)
            return with_rig_if_needed(settings, inputs.environment, auto_rig) if arguments.auto else settings

        settings = read_settings()
        problems = [*tuning_problems(settings), *startup_problems(settings)]
        if lacks_ollama(settings, inputs.environment):
            problems.append(
                f"ollama.binary: there is no program `{settings.ollama.binary}` on PATH: install Ollama, set its path "
                f"(--set ollama.binary=/path/to/ollama), or try an emulated rig (--rig {auto_rig})"
            )
        if problems:
            raise ConfigError(problems)
        uvloop.run(serve(settings, read_settings))
    except ConfigError as error:
        print_problems(error.problems)
        return EXIT_MISUSED
    return EXIT_OK


def lacks_ollama(settings: Settings, environment: Mapping[str, str]) -> bool:
    """Whether the router would have to start real servers but there is no ollama executable."""
    executable = shutil.which(settings.ollama.binary, path=environment.get("PATH"))
    return settings.rig is None and settings.starts_servers and executable is None


def with_rig_if_needed(settings: Settings, environment: Mapping[str, str], auto_rig: str) -> Settings:
    """The settings, with an emulated rig if there is no Ollama to run."""
    if not lacks_ollama(settings, environment):
        return settings
    print(
        f"llamayard: no `{settings.ollama.binary}` on PATH: serving an EMULATED rig ({auto_rig}); its answers are "
        "not real.\nllamayard: for real models install Ollama and start again.",
        file=sys.stderr,
    )
    return settings.model_copy(update={"rig": auto_rig})
