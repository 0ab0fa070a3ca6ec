"""Faults that an EMULATED server shows on request: `faults.json` in the rig's directory, read again when it changes.

It is a list of rules, each an object: `instance` (the router's name for the server), `GPU` (a UUID or its beginning,
for servers that see that GPU) and `model` (a name) narrow it down; the rest says what goes wrong:

- `slow`: runners and loads take so many times longer;
- `hang`: runners stop computing, and answer their health check all the same;
- `die`: runners kill themselves within their next answer;
- `oom`: loads fail for want of memory, as if another program had taken it in between;
- `lose_slot`: the slot of a client that hangs up within a stream is lost until the model is unloaded;
- `server`: `hang` (accepts connections and answers nothing), `die` (exit status 1), or `refuse_start`.

It only reads and matches; others act.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from router.domain.model_names import parse_name
from router.lab.emulator import vram

FILE = "faults.json"
_KEYS = frozenset({"instance", "gpu", "model", "slow", "hang", "die", "oom", "lose_slot", "server"})
_SERVER = ("hang", "die", "refuse_start")


@dataclass(frozen=True, slots=True)
class Fault:
    """One rule."""

    instance: str | None = None
    gpu: str | None = None
    model: str | None = None
    slow: float = 1.0
    hang: bool = False
    die: bool = False
    oom: bool = False
    lose_slot: bool = False
    server: str | None = None


@dataclass(frozen=True, slots=True)
class Behaviour:
    """What all rules together mean for one model on one server, or for the server itself."""

    slow: float = 1.0
    hang: bool = False
    die: bool = False
    oom: bool = False
    lose_slot: bool = False


def read_faults(directory: Path | None) -> tuple[Fault, ...]:
    """The rules; none where there is no file. Raises ValueError for a file that says something unknown."""
    if directory is None:
        return ()
    try:
        data: Any = json.loads((directory / FILE).read_text(encoding="utf-8"))
    except OSError:
        return ()
    if not isinstance(data, list):
        raise ValueError(f"{FILE}: a list of rules is wanted")
    return tuple(_fault(rule) for rule in cast("list[Any]", data))


def write_faults(directory: Path, faults: Iterable[Mapping[str, object]]) -> None:
    """Replaces all rules. Raises ValueError for one that says something unknown."""
    rules = [dict(fault) for fault in faults]
    for rule in rules:
        _fault(rule)
    vram.write_json(directory / FILE, rules)


def _fault(rule: Any) -> Fault:
    if not isinstance(rule, dict):
        raise ValueError(f"{FILE}: a rule is an object, not {rule!r}")
    given = cast("dict[str, Any]", rule)
    unknown = set(given) - _KEYS
    if unknown:
        raise ValueError(f"{FILE}: no key {min(unknown)!r}; there are: {', '.join(sorted(_KEYS))}")
    if given.get("server") not in (None, *_SERVER):
        raise ValueError(f"{FILE}: server: {given['server']!r} is none of {', '.join(_SERVER)}")
    slow = given.get("slow", 1.0)
    if isinstance(slow, bool) or not isinstance(slow, int | float) or not slow > 0:
        raise ValueError(f"{FILE}: slow: a number above 0 is wanted, not {slow!r}")
    return Fault(**given)


def _concerns(fault: Fault, instance: str, gpus: Iterable[str]) -> bool:
    if fault.instance is not None and fault.instance != instance:
        return False
    return fault.gpu is None or any(gpu.startswith(fault.gpu) for gpu in gpus)


def server_fault(faults: Iterable[Fault], instance: str, gpus: Iterable[str]) -> str | None:
    """What the server itself shall do wrong."""
    seen = tuple(gpus)
    return next((one.server for one in faults if one.server and _concerns(one, instance, seen)), None)


def behaviour(faults: Iterable[Fault], instance: str, gpus: Iterable[str], model: str) -> Behaviour:
    """What goes wrong with a model; `model` in its shortest form. Several rules add up."""
    seen = tuple(gpus)
    found = [one for one in faults if _concerns(one, instance, seen) and _means(one, model)]
    return Behaviour(
        slow=max((one.slow for one in found), default=1.0),
        hang=any(one.hang for one in found),
        die=any(one.die for one in found),
        oom=any(one.oom for one in found),
        lose_slot=any(one.lose_slot for one in found),
    )


def _means(fault: Fault, model: str) -> bool:
    if fault.model is None:
        return True
    try:
        return parse_name(fault.model).shortest == model
    except ValueError:
        return False
