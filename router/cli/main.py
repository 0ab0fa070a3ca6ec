"""The `llamayard` command line. `llamayard --help` lists the commands.

A user's mistake ends in a sentence on standard error and exit code 2, never in a traceback. A command imports what it
needs when it runs: `--help` is quick, and a running router does not hold the other commands in memory.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TextIO, cast

from router import __version__
from router.cli.exit_codes import EXIT_BROKEN_PIPE, EXIT_INTERRUPTED, EXIT_OK

AUTO_RIG = "2x3090"
"""The emulated rig of `serve --auto` on a machine without Ollama."""
_OPERATOR_COMMANDS = {
    "drain": "take a GPU, an instance or all out of service; running requests finish",
    "resume": "bring back what was drained",
    "restart": "restart instances one after the other, under load",
}


def main(arguments: Sequence[str] | None = None, environment: Mapping[str, str] | None = None) -> int:
    """Runs the command line and returns its exit code; `environment` defaults to that of the process."""
    try:
        try:
            return _run(sys.argv[1:] if arguments is None else list(arguments), environment)
        finally:
            print(end="", flush=True)
    except KeyboardInterrupt:  # while the router runs, it handles the signal itself
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # `llamayard status | head`
        _discard_output(sys.stdout)
        return EXIT_BROKEN_PIPE


def _discard_output(stream: TextIO) -> None:
    """Redirects the stream, so that Python does not report its unwritten rest at exit."""
    with contextlib.suppress(OSError), Path(os.devnull).open("wb") as null:
        os.dup2(null.fileno(), stream.fileno())


def _run(arguments: list[str], environment: Mapping[str, str] | None) -> int:
    if arguments[:1] == ["simulate"]:  # it has its own parser
        return _simulate(arguments[1:])
    if arguments[:1] == ["keys"]:
        return _keys(arguments[1:], environment)
    if arguments[:1] == ["plan"]:
        return _plan(arguments[1:], environment)
    parsed = _parser().parse_args(arguments)
    return cast("int", parsed.run(parsed, environment))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llamayard",
        description="One endpoint for one Ollama server per GPU and one over all GPUs.",
        epilog="Every configuration key can also be set in the environment: LLAMAYARD_SECTION__KEY.",
    )
    parser.add_argument("--version", action="version", version=f"llamayard {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="run the servers and the endpoint")
    _add_configuration(serve)
    serve.add_argument(
        "--auto",
        action="store_true",
        help=f"if Ollama is not installed, run EMULATED GPUs and servers ({AUTO_RIG}) instead of failing",
    )
    serve.set_defaults(run=_serve)
    _add_init(commands.add_parser("init", help="ask a few questions and write a configuration for the GPUs found"))
    _add_router_commands(commands.add_parser)
    _add_model_commands(commands.add_parser)
    _add_operator_commands(commands.add_parser)
    check = commands.add_parser(
        "check-config", help="check the configuration; show every key's value and where it was set"
    )
    _add_configuration(check)
    check.add_argument("--changed", action="store_true", help="show only keys that differ from their default")
    check.add_argument("--json", action="store_true", help="print the result as JSON")
    check.set_defaults(run=_check_config)
    doctor = commands.add_parser(
        "doctor", help="examine the machine and the configuration, and name the command that mends each finding"
    )
    _add_configuration(doctor)
    doctor.add_argument("--power-supply", metavar="WATTS", help="rating of the power supply, which no program can read")
    doctor.add_argument("--verbose", action="store_true", help="say of every check why it matters")
    doctor.add_argument("--json", action="store_true", help="print the result as JSON")
    doctor.set_defaults(run=_doctor)
    commands.add_parser("keys", help="create, list, revoke and rotate access keys")
    _add_usage(commands.add_parser("usage", help="show what each client used of each model: tokens, GPU time, energy"))
    commands.add_parser("plan", help="show what models take on GPUs, and whether they fit")
    commands.add_parser("simulate", help="compare the router with stock servers on SIMULATED GPUs")
    version = commands.add_parser("version", help="print the version")
    version.set_defaults(run=_version)
    return parser


def _add_router_commands(add_parser: Callable[..., argparse.ArgumentParser]) -> None:
    """The commands that show the state of the running router."""
    status = add_parser("status", help="show GPUs, instances, models and queue of the running router")
    _add_configuration(status)
    status.add_argument("--json", action="store_true", help="print the status as JSON")
    status.add_argument(
        "--watch", nargs="?", const="2", metavar="SECONDS", help="print it again and again (default: every 2 s)"
    )
    status.set_defaults(run=_status)
    top = add_parser("top", help="show GPUs, models, streams and queue live")
    _add_configuration(top)
    top.add_argument("--json", action="store_true", help="print the status document once, as JSON")
    top.set_defaults(run=_top)
    ps = add_parser("ps", help="list the loaded models with their GPUs, instance, expiry and pin")
    _add_configuration(ps)
    ps.add_argument("--json", action="store_true", help="print the models as JSON")
    ps.set_defaults(run=_ps)
    logs = add_parser("logs", help="show the last lines that servers have written, and with -f those that come")
    logs.add_argument("instance", nargs="?", metavar="INSTANCE", help="its name (default: all)")
    _add_configuration(logs)
    logs.add_argument("-f", "--follow", action="store_true", help="go on until Ctrl-C")
    logs.add_argument("--lines", default="100", metavar="N", help="how many of the last lines (default: 100)")
    logs.add_argument("--json", action="store_true", help="print each line as a JSON object")
    logs.set_defaults(run=_logs)


def _add_model_commands(add_parser: Callable[..., argparse.ArgumentParser]) -> None:
    """The commands about one model or one request."""
    load = add_parser("load", help="load a model as a client's first request would, and tell where it went")
    load.add_argument("model", metavar="MODEL", help="its name, or an alias")
    load.add_argument("--context", metavar="TOKENS", help="the context to load it with (num_ctx)")
    _add_configuration(load)
    load.add_argument("--json", action="store_true", help="print the replica as JSON")
    load.set_defaults(run=_load)
    unload = add_parser("unload", help="unload a model from all instances, once its requests have ended")
    unload.add_argument("model", metavar="MODEL", help="its name, or an alias")
    _add_configuration(unload)
    unload.add_argument("--json", action="store_true", help="print the result as JSON")
    unload.set_defaults(run=_unload)
    pin = add_parser("pin", help="pin a model to GPUs until the router restarts, or with --save for good")
    pin.add_argument("model", metavar="MODEL", help="its name, or an alias")
    pin.add_argument("gpus", metavar="GPU[,GPU]", help="exactly these: indexes or UUIDs")
    unpin = add_parser("unpin", help="let the router choose the GPUs of a model, until it restarts or with --save")
    unpin.add_argument("model", metavar="MODEL", help="its name, or an alias")
    for command in (pin, unpin):
        _add_configuration(command)
        command.add_argument("--save", action="store_true", help="also write it into the configuration file")
        command.add_argument("--json", action="store_true", help="print the result as JSON")
        command.set_defaults(run=_pin)
    explain = add_parser(
        "explain", help="show where a request for a model would go now, who would leave, and every candidate"
    )
    explain.add_argument("model", metavar="MODEL", help="its name, or an alias")
    explain.add_argument("--context", metavar="TOKENS", help="the context that the request asks for (num_ctx)")
    _add_configuration(explain)
    explain.add_argument("--json", action="store_true", help="print the explanation as JSON")
    explain.set_defaults(run=_explain)
    why = add_parser("why", help="show what became of a request, and what it waited for")
    why.add_argument("request_id", metavar="REQUEST_ID", help="X-Request-ID of the response; request_id in the log")
    _add_configuration(why)
    why.add_argument("--json", action="store_true", help="print the answer as JSON")
    why.set_defaults(run=_why)


def _add_operator_commands(add_parser: Callable[..., argparse.ArgumentParser]) -> None:
    for name, words in _OPERATOR_COMMANDS.items():
        command = add_parser(name, help=words)
        _add_configuration(command)
        command.add_argument("target", nargs="*", metavar="TARGET", help="gpu N, instance NAME or all")
        if name == "restart":
            command.add_argument(
                "--timeout", type=float, metavar="SECONDS", help="time that running requests get (default: 300)"
            )
        command.set_defaults(run=_operate, command=name)
    reload = add_parser("reload", help="read the configuration again and apply what can change while the router runs")
    _add_configuration(reload)
    reload.set_defaults(run=_reload)


def _add_init(init: argparse.ArgumentParser) -> None:
    init.add_argument("--config", type=Path, metavar="FILE", help="file to write (default: ./llamayard.yaml)")
    init.add_argument("--port", help="port to listen on, instead of asking for it")
    init.add_argument("--rig", metavar="SPEC", help="EMULATED GPUs and servers: 2x3090, 4090+3090, h100 or a file")
    init.add_argument("--yes", action="store_true", help="ask nothing, take the defaults")
    init.add_argument("--force", action="store_true", help="write over an existing file")
    init.add_argument("--json", action="store_true", help="ask nothing; print what was found and written as JSON")
    init.set_defaults(run=_init)


def _add_usage(usage: argparse.ArgumentParser) -> None:
    usage.add_argument(
        "--by", default="client,model", metavar="FIELDS", help="day, client (or key), model; default: client,model"
    )
    usage.add_argument(
        "--since", default="30d", metavar="DAYS", help="the last days, such as 7d (default: 30d), or a date, in UTC"
    )
    _add_configuration(usage)
    form = usage.add_mutually_exclusive_group()
    form.add_argument("--csv", action="store_true", help="print the rows as CSV")
    form.add_argument("--json", action="store_true", help="print the rows as JSON")
    usage.set_defaults(run=_usage)


def _add_configuration(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file (else ./llamayard.yaml, then /etc)")
    parser.add_argument("--host", help="address to listen on (server.host)")
    parser.add_argument("--port", help="port to listen on (server.port)")
    parser.add_argument("--rig", metavar="SPEC", help="EMULATED GPUs and servers: 2x3090, 4090+3090, h100 or a file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any key, e.g. queue.limit=64")


def _serve(arguments: argparse.Namespace, environment: Mapping[str, str] | None) -> int:
    from router.cli import serve

    return serve.run(arguments, environment, AUTO_RIG)


def _init(arguments: argparse.Namespace, environment: Mapping[str, str] | None) -> int:
    from router.cli import init

    return init.run(arguments, environment)


def _status(arguments: argparse.Namespace, environment: Mapping[str, str] | None) -> int:
    from router.cli import status

    return status.run(arguments, environment)


def _operate(arguments: argparse.Namespace, environment: Mapping[str, str] | None) -> int:
    from router.cli import operate

    return operate.run(arguments, environment)


def _reload(arguments: argparse.Namespace, environment: Mapping[str, str] | None) -> int:
    from router.cli import reload

    return reload.run(arguments, environment)


def _top(arguments: argparse.Namespace, environment: Mapping[str, str] | None) -> int:
    from router.cli import top

    return top.run(arguments, environment)


def _ps(arguments: argparse.Namespace, environment: Mapping[str, str] | None) -> int:
    from router.cli import ps

    return ps.run(arguments, environment)


def _logs(arguments: argparse.Namespace, environment: Mapping[str, str] | None) -> int:
    from router.cli import logs

    return logs.run(arguments, environment)


def _load(arguments: argparse.Namespace, environment: Mapping[str, str] | None) -> int:
    from router.cli import load

    return load.run(arguments, environment)


def _unload(arguments: argparse.Namespace, environment: Mapping[str, str] | None) -> int:
    from router.cli import unload

    return unload.run(arguments, environment)


def _pin(arguments: argparse.Namespace, environment: Mapping[str, str] | None) -> int:
    from router.cli import pin

    return pin.run(arguments, environment)


def _explain(arguments: argparse.Namespace, environment: Mapping[str, str] | None) -> int:
    from router.cli import explain

    return explain.run(arguments, environment)


def _why(arguments: argparse.Namespace, environment: Mapping[str, str] | None) -> int:
    from router.cli import why

    return why.run(arguments, environment)


def _check_config(arguments: argparse.Namespace, environment: Mapping[str, str] | None) -> int:
    from router.cli import check_config

    return check_config.run(arguments, environment)


def _doctor(arguments: argparse.Namespace, environment: Mapping[str, str] | None) -> int:
    from router.cli import doctor

    return doctor.run(arguments, environment)


def _keys(arguments: list[str], environment: Mapping[str, str] | None) -> int:
    from router.cli import keys

    return keys.main(arguments, environment)


def _usage(arguments: argparse.Namespace, environment: Mapping[str, str] | None) -> int:
    from router.cli import usage

    return usage.run(arguments, environment)


def _plan(arguments: list[str], environment: Mapping[str, str] | None) -> int:
    from router.cli import plan

    return plan.main(arguments, environment)


def _simulate(arguments: Sequence[str]) -> int:
    from router.cli import simulate

    return simulate.main(arguments)


def _version(arguments: argparse.Namespace, environment: Mapping[str, str] | None) -> int:
    del arguments, environment
    print(f"llamayard {__version__}")
    return EXIT_OK
