"""`llamayard drain`, `resume` and `restart`: commands to the running router."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, cast

from router.cli.configuration import inputs_of
from router.cli.exit_codes import EXIT_OK
from router.cli.reporting import reports_problems
from router.cli.router_client import RouterClient
from router.config.inputs import ConfigError

_FORMS = "write `gpu N`, `instance NAME` or `all`"


@reports_problems
def run(arguments: argparse.Namespace, environment: Mapping[str, str] | None) -> int:
    """Sends the command; EXIT_FAILED if the router refuses it or cannot be reached."""
    command = cast("str", arguments.command)
    client = RouterClient(inputs_of(arguments, environment).endpoint())
    body = target_of(arguments.target or (["all"] if command == "restart" else []))
    if getattr(arguments, "timeout", None) is not None:
        body["timeout_seconds"] = arguments.timeout
    print(describe(command, client.call("POST", f"/llamayard/{command}", body)))
    return EXIT_OK


def target_of(words: Sequence[str]) -> dict[str, Any]:
    """`["gpu", "1"]` -> `{"gpu": "1"}`.

    Raises:
        ConfigError: the words name no target.
    """
    match list(words):
        case ["all"]:
            return {"all": True}
        case ["gpu" | "instance" as kind, name]:
            return {kind: name}
        case _:
            raise ConfigError([f"{' '.join(words) or 'no target'}: {_FORMS}"])


def describe(command: str, answer: Mapping[str, Any]) -> str:
    """One line that says what is so now."""
    if command == "restart":
        restart = answer.get("restart")
        if not isinstance(restart, Mapping):
            return "nothing to restart"
        row = cast("Mapping[str, Any]", restart)
        names = [name for name in (row.get("instance"), *cast("list[str]", row.get("pending") or [])) if name]
        return f"restarting one after the other: {', '.join(map(str, names))}; `llamayard status --watch` shows it"
    drained = cast("Mapping[str, Any]", answer.get("drained") or {})
    if drained.get("all"):
        return "drained: all"
    parts = [*(f"GPU {index}" for index in drained.get("gpus") or ()), *(drained.get("instances") or ())]
    if not parts:
        return "nothing is drained: everything is in service"
    return f"drained: {', '.join(map(str, parts))}"
