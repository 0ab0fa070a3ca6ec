"""The `llamayard` command: serve, status, check-config, simulate, version. Only this picks uvloop.

A user's mistake ends in a sentence on standard error and exit code 2, never in a traceback. What commands other than
`serve` need is loaded by name when they are given: a router that runs for months would only hold it in memory.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO, cast

import uvloop

from router import __version__
from router.app.wiring import serve
from router.config.instance_options import tuning_problems
from router.config.settings import ConfigError, Settings, find_config, load_settings, process_environment

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_MISUSED = 2
EXIT_INTERRUPTED = 130
EXIT_UNREAD = 141
"""As of a program that SIGPIPE ended."""
AUTO_RIG = "2x3090"
"""What `serve --auto` emulates where there is no Ollama to run."""


def main(arguments: Sequence[str] | None = None, environment: Mapping[str, str] | None = None) -> int:
    """Runs the command line and returns its exit code: 0 well, 1 failed, 2 misused, 141 where nobody reads on."""
    try:
        try:
            return _run(arguments, environment)
        finally:
            print(end="", flush=True)
    except BrokenPipeError:  # `llamayard status | head`
        _write_no_more(sys.stdout)
        return EXIT_UNREAD


def _write_no_more(stream: TextIO) -> None:
    """What is left in the stream goes nowhere, so that Python has nothing to complain of at its own end."""
    with contextlib.suppress(OSError), Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


def _run(arguments: Sequence[str] | None, environment: Mapping[str, str] | None) -> int:
    words = sys.argv[1:] if arguments is None else list(arguments)
    given = None if words[:1] == ["simulate"] else _parser().parse_args(words)
    known = process_environment() if environment is None else environment
    try:
        if given is None:
            return _simulate(words[1:])
        return cast("int", given.run(given, known))
    except ConfigError as error:
        _complain(error.problems)
        return EXIT_MISUSED
    except KeyboardInterrupt:  # before or after the time in which the running router handles the signal itself
        return EXIT_INTERRUPTED


def _simulate(words: Sequence[str]) -> int:
    simulator: Any = importlib.import_module("router.cli.simulate")
    return cast("int", simulator.main(words))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llamayard",
        description="One endpoint over one Ollama server per GPU, and one spread over all.",
        epilog="Every configuration key can also be set as LLAMAYARD_SECTION__KEY in the environment.",
    )
    parser.add_argument("--version", action="version", version=f"llamayard {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    serving = commands.add_parser("serve", help="run the servers and the endpoint")
    _add_configuration(serving)
    serving.add_argument(
        "--auto",
        action="store_true",
        help=f"with no Ollama installed, run EMULATED GPUs and servers ({AUTO_RIG}) instead of failing",
    )
    serving.set_defaults(run=_serve)
    status = commands.add_parser("status", help="show GPUs, instances, models and queue of the running router")
    _add_configuration(status)
    status.add_argument("--json", action="store_true", help="print the answer as it is")
    status.set_defaults(run=_status)
    check = commands.add_parser("check-config", help="show every key's effective value and where it comes from")
    _add_configuration(check)
    check.set_defaults(run=_check_config)
    commands.add_parser("simulate", help="play the router and stock servers over SIMULATED GPUs")
    version = commands.add_parser("version", help="print the version")
    version.set_defaults(run=_version)
    return parser


def _add_configuration(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file (else ./llamayard.yaml, then /etc)")
    parser.add_argument("--host", help="address to listen on (server.host)")
    parser.add_argument("--port", help="port to listen on (server.port)")
    parser.add_argument("--rig", metavar="SPEC", help="EMULATED GPUs and servers: 2x3090, 4090+3090, h100 or a file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any key, e.g. queue.limit=64")


def _flags(given: argparse.Namespace) -> dict[str, object]:
    """Flags by dotted key; ConfigError for a `--set` without a value."""
    flags: dict[str, object] = {}
    for pair in cast("list[str]", given.set):
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise ConfigError([f"--set {pair}: write KEY=VALUE, such as queue.limit=64"])
        flags[key.strip()] = value
    named = {"server.host": given.host, "server.port": given.port, "rig": given.rig}
    return {**flags, **{key: value for key, value in named.items() if value is not None}}


def _settings(given: argparse.Namespace, environment: Mapping[str, str]) -> Settings:
    return load_settings(find_config(given.config, Path.cwd()), environment, _flags(given))


def _serve(given: argparse.Namespace, environment: Mapping[str, str]) -> int:
    settings = _settings(given, environment)
    if given.auto:
        settings = with_what_is_there(settings, environment)
    problems = tuning_problems(settings)
    if lacks_ollama(settings, environment):
        problems.append(
            f"ollama.binary: there is no program `{settings.ollama.binary}` on PATH: install Ollama, give its path "
            f"(--set ollama.binary=/path/to/ollama), or look around with an emulated rig (--rig {AUTO_RIG})"
        )
    if problems:
        raise ConfigError(problems)
    return uvloop.run(serve(settings))


def lacks_ollama(settings: Settings, environment: Mapping[str, str]) -> bool:
    """Whether the router would have to start real servers without a program to start."""
    spawns = settings.discovers or any(instance.url is None for instance in settings.instances)
    found = shutil.which(settings.ollama.binary, path=environment.get("PATH"))
    return settings.rig is None and spawns and found is None


def with_what_is_there(settings: Settings, environment: Mapping[str, str]) -> Settings:
    """The settings as they are where an Ollama can be run (on its GPUs or the CPU), else with an emulated rig."""
    if not lacks_ollama(settings, environment):
        return settings
    words = f"no `{settings.ollama.binary}` on PATH: serving an EMULATED rig ({AUTO_RIG}); its answers are made up."
    print(f"llamayard: {words}\nllamayard: install Ollama and start again for the real thing.", file=sys.stderr)
    return settings.model_copy(update={"rig": AUTO_RIG})


def _status(given: argparse.Namespace, environment: Mapping[str, str]) -> int:
    status: Any = importlib.import_module("router.cli.status")
    server = _settings(given, environment).server
    try:
        document = status.fetch_status(server.host, server.port, server.tls_certificate)
    except status.StatusError as error:
        _complain([str(error)])
        return EXIT_FAILED
    print(json.dumps(document, indent=2) if given.json else status.render_status(document))
    return EXIT_OK


def _check_config(given: argparse.Namespace, environment: Mapping[str, str]) -> int:
    check: Any = importlib.import_module("router.cli.check_config")
    try:
        lines = cast("list[str]", check.effective(find_config(given.config, Path.cwd()), environment, _flags(given)))
    except ConfigError as error:
        _complain(error.problems)
        return EXIT_MISUSED
    print("\n".join(lines))
    return EXIT_OK


def _version(given: argparse.Namespace, environment: Mapping[str, str]) -> int:
    del given, environment
    print(f"llamayard {__version__}")
    return EXIT_OK


def _complain(problems: Sequence[str]) -> None:
    for problem in problems:
        print(f"llamayard: {problem}", file=sys.stderr)
