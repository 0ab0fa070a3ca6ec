"""`llamayard keys`: creates, lists, revokes and rotates access keys. A key is printed once, when it is made."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

from router.app.access_keys import Keys, change_keys, has_keys, keys_path, read_keys, wall_seconds, with_new_secret
from router.cli.configuration import inputs_of, print_problems
from router.cli.exit_codes import EXIT_MISUSED, EXIT_OK
from router.config.parsing import duration_seconds, keep_alive_seconds
from router.config.settings import ConfigError, Settings
from router.domain.access_key import PRIORITIES, UNLIMITED, AccessKey, KeyLimits, RouteClass
from router.domain.request import LayoutKind

_DAY_SECONDS = 86_400.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,62}")
_LIMITS = ("requests_per_minute", "tokens_per_minute", "tokens_per_day", "concurrent_requests")


def main(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> int:
    """Runs the command; EXIT_MISUSED if the key or its file cannot be used."""
    given = _parser().parse_args(list(arguments))
    actions = {"create": _create, "list": _list, "revoke": _revoke, "rotate": _rotate}
    try:
        actions[given.action](given, inputs_of(given, environment).settings())
    except ConfigError as error:
        print_problems(error.problems)
        return EXIT_MISUSED
    return EXIT_OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llamayard keys",
        description="Access keys: who may use the router, and how much. A running router takes changes over by itself.",
    )
    actions = parser.add_subparsers(required=True, metavar="ACTION", dest="action")
    create = actions.add_parser("create", help="make a key and print it, once")
    create.add_argument("name", help="stands for the key in logs and metrics")
    create.add_argument("--user", help="whose it is: several keys of a user share one fair share (default: NAME)")
    create.add_argument("--expires", metavar="DURATION", help="for how long it is valid: 90d, 12h (default: for ever)")
    create.add_argument(
        "--class", action="append", dest="classes", choices=[each.value for each in RouteClass], default=[],
        help="what it may use; may be repeated (default: inference)",
    )  # fmt: skip
    create.add_argument(
        "--model", action="append", dest="models", default=[], metavar="PATTERN",
        help="models that it may use, `*` is a wildcard; may be repeated (default: all)",
    )  # fmt: skip
    for limit in _LIMITS:
        create.add_argument(f"--{limit.replace('_', '-')}", type=_count, metavar="N")
    create.add_argument("--priority", choices=list(PRIORITIES), default="normal", help="its highest and usual priority")
    create.add_argument("--context-length-max", type=_count, metavar="TOKENS", help="largest num_ctx")
    create.add_argument("--keep-alive-min", metavar="DURATION", help="shortest keep_alive; 0 unloads are then refused")
    create.add_argument("--keep-alive-max", metavar="DURATION", help="longest keep_alive")
    create.add_argument(
        "--layout", action="append", dest="layouts", choices=[each.value for each in LayoutKind], default=[],
        help="layouts that X-Llamayard-Layout may ask for; may be repeated (default: all)",
    )  # fmt: skip
    create.add_argument(
        "--forwards-users", action="store_true",
        help="it is a program's that names its users in X-OpenWebUI-User-Id: each has a fair share",
    )  # fmt: skip
    listing = actions.add_parser("list", help="show the keys, without the keys themselves")
    revoke = actions.add_parser("revoke", help="end a key")
    rotate = actions.add_parser("rotate", help="replace a key by a new one with the same rules, and print it, once")
    for each in (revoke, rotate):
        each.add_argument("name")
    for each in (create, listing, revoke, rotate):
        each.add_argument("--config", type=Path, metavar="FILE", help="YAML file (else ./llamayard.yaml, then /etc)")
        each.add_argument(
            "--set", action="append", default=[], metavar="KEY=VALUE", help="any key of the configuration"
        )
        each.set_defaults(host=None, port=None, rig=None)
    return parser


def _create(arguments: argparse.Namespace, settings: Settings) -> None:
    was_on = has_keys(settings)
    key, secret = with_new_secret(key_of(arguments, wall_seconds()))

    def change(keys: Keys) -> Keys:
        if any(each.name == key.name for each in keys):
            raise ConfigError([f"there is a key '{key.name}': choose another name, or `llamayard keys rotate`"])
        return (*keys, key)

    change_keys(settings, change)
    print(secret)
    if not was_on:
        print(
            f"llamayard: first key in {keys_path(settings)}: every request needs a key now, within seconds also those "
            "to a router that runs",
            file=sys.stderr,
        )


def key_of(arguments: argparse.Namespace, now: float) -> AccessKey:
    """The entry that the flags describe, without a digest.

    Raises:
        ConfigError: a name or a duration cannot be used.
    """
    for flag, text in (("NAME", arguments.name), ("--user", arguments.user)):
        if text is not None and _NAME.fullmatch(text) is None:
            raise ConfigError([f"{flag}: {text!r}: use up to 63 letters, digits, `_`, `.`, `@` and `-`"])
    lifetime = _duration("--expires", arguments.expires)
    limits = KeyLimits(**{limit: getattr(arguments, limit) for limit in _LIMITS})
    return AccessKey(
        name=arguments.name,
        sha256="",
        user=arguments.user or arguments.name,
        created_at=now,
        expires_at=None if lifetime is None else now + lifetime,
        classes=frozenset(map(RouteClass, arguments.classes or [RouteClass.INFERENCE])),
        models=tuple(arguments.models or ["*"]),
        limits=limits,
        priority=PRIORITIES[arguments.priority],
        context_length_max=arguments.context_length_max,
        keep_alive_seconds_min=_keep_alive("--keep-alive-min", arguments.keep_alive_min),
        keep_alive_seconds_max=_keep_alive("--keep-alive-max", arguments.keep_alive_max),
        layouts=frozenset(map(LayoutKind, arguments.layouts or LayoutKind)),
        forwards_users=arguments.forwards_users,
    )


def _list(arguments: argparse.Namespace, settings: Settings) -> None:
    del arguments
    keys = read_keys(settings)
    if keys is None:
        print(f"llamayard: no keys: {keys_path(settings)} does not exist", file=sys.stderr)
        return
    now = wall_seconds()
    rows = [("NAME", "USER", "CLASSES", "EXPIRES", "RULES"), *(_row(key, now) for key in keys)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        print("  ".join((*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[4])).rstrip())


def _row(key: AccessKey, now: float) -> tuple[str, str, str, str, str]:
    expires = "never" if key.expires_at is None else datetime.fromtimestamp(key.expires_at, UTC).strftime("%Y-%m-%d")
    if not key.is_valid(now):
        expires = "expired"
    return key.name, key.user, ",".join(sorted(key.classes)), expires, ", ".join(_rules(key))


def _rules(key: AccessKey) -> list[str]:
    """What the key differs in from one without flags."""
    rules = [] if key.sees_all_models else [f"models {' '.join(key.models)}"]
    if key.limits != UNLIMITED:
        rules += [f"{name}={value}" for name in _LIMITS if (value := getattr(key.limits, name)) is not None]
    rules += [f"priority {word}" for word, value in PRIORITIES.items() if value == key.priority != 0]
    names = ("context_length_max", "keep_alive_seconds_min", "keep_alive_seconds_max")
    rules += [f"{name}={value:g}" for name in names if (value := getattr(key, name)) is not None]
    if key.layouts != frozenset(LayoutKind):
        rules.append(f"layouts {' '.join(sorted(key.layouts))}")
    return [*rules, "forwards users"] if key.forwards_users else rules


def _revoke(arguments: argparse.Namespace, settings: Settings) -> None:
    def change(keys: Keys) -> Keys:
        _find(keys, arguments.name)
        return tuple(key for key in keys if key.name != arguments.name)

    change_keys(settings, change)
    print(f"llamayard: key '{arguments.name}' is revoked", file=sys.stderr)
    if not read_keys(settings):
        print(
            "llamayard: no key is left: requests are refused until you create one; to turn keys off, remove "
            f"{keys_path(settings)} and restart the router",
            file=sys.stderr,
        )


def _rotate(arguments: argparse.Namespace, settings: Settings) -> None:
    made: list[str] = []

    def change(keys: Keys) -> Keys:
        old = _find(keys, arguments.name)
        new, secret = with_new_secret(replace(old, created_at=wall_seconds()))
        made.append(secret)
        return tuple(new if key is old else key for key in keys)

    change_keys(settings, change)
    print(made[0])


def _find(keys: Keys, name: str) -> AccessKey:
    found = next((key for key in keys if key.name == name), None)
    if found is None:
        raise ConfigError([f"there is no key '{name}': `llamayard keys list` shows those there are"])
    return found


def _count(text: str) -> int:
    value = int(text) if text.isascii() and text.isdigit() else 0
    if not 0 < value <= 10**12:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return value


def _duration(flag: str, text: str | None) -> float | None:
    """Seconds; `d` is a day. Raises ConfigError."""
    if text is None:
        return None
    days = re.fullmatch(r"(\d{1,5})d", text.strip())
    try:
        seconds = float(days[1]) * _DAY_SECONDS if days else cast("float", duration_seconds(text))
    except ValueError as error:
        raise ConfigError([f"{flag} {text}: {error}, or a number of days such as 90d"]) from error
    if seconds <= 0:
        raise ConfigError([f"{flag} {text}: must be more than 0"])
    return seconds


def _keep_alive(flag: str, text: str | None) -> float | None:
    if text is None:
        return None
    try:
        return cast("float", keep_alive_seconds(text))
    except ValueError as error:
        raise ConfigError([f"{flag} {text}: {error}"]) from error
