"""What the commands that ask the running router have in common: how they report that they cannot be carried out."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import wraps

from router.cli.configuration import print_problems
from router.cli.exit_codes import EXIT_FAILED, EXIT_MISUSED
from router.cli.router_client import Refused, StatusError
from router.config.inputs import ConfigError

Command = Callable[[argparse.Namespace, Mapping[str, str] | None], int]


def reports_problems(command: Command) -> Command:
    """Turns ConfigError into EXIT_MISUSED, StatusError and Refused into EXIT_FAILED; their texts go to stderr."""

    @wraps(command)
    def reporting(arguments: argparse.Namespace, environment: Mapping[str, str] | None) -> int:
        try:
            return command(arguments, environment)
        except ConfigError as error:
            print_problems(error.problems)
            return EXIT_MISUSED
        except (StatusError, Refused) as error:
            print_problems([str(error)])
            return EXIT_FAILED

    return reporting
