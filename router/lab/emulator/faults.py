"""Fault injection for EMULATED servers: `faults.json` in the emulator's directory, reread when it changes.

The file is a list of rules (objects). `instance` (the router's name for the server), `gpu` (a UUID or a prefix of one,
for servers that see that GPU) and `model` (a name) limit the scope; the other keys are the faults:

- `slow`: runners and loads take this many times longer;
- `hang`: runners stop computing but still answer their health check;
- `die`: runners kill themselves during their next answer;
- `oom`: loads fail with out of memory, as if another program had taken the memory in between;
- `lose_slot`: the slot of a client that disconnects mid-stream leaks until the model is unloaded;
- `unload`: `refuse` (requests to unload are answered with 500) or `ignore` (answered, but the model stays listed, as in
  Ollama's "Stopping..."); the model stays loaded until its server ends;
- `temperature_celsius`, `throttle` (a reason in NVML's words), `xid` (reported once), `ecc_errors`: of the GPU (`gpu`);
- `server`: `hang` (accepts connections but never answers), `die` (exit status 1), or `refuse_start`.

This module only reads and matches rules; others apply them.
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
_GPU_KEYS = ("temperature_celsius", "throttle", "xid", "ecc_errors")
_KEYS = frozenset(
    {"instance", "gpu", "model", "slow", "hang", "die", "oom", "lose_slot", "unload", "server", *_GPU_KEYS}
)
_SERVER_FAULTS = ("hang", "die", "refuse_start")
_UNLOAD_FAULTS = ("refuse", "ignore")


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
    unload: str | None = None
    server: str | None = None
    temperature_celsius: int | None = None
    throttle: str | None = None
    xid: int | None = None
    ecc_errors: int | None = None


@dataclass(frozen=True, slots=True)
class Behaviour:
    """Combined effect of all rules on one model of one server."""

    slow: float = 1.0
    hang: bool = False
    die: bool = False
    oom: bool = False
    lose_slot: bool = False
    unload: str | None = None


def read_faults(directory: Path | None) -> tuple[Fault, ...]:
    """Reads the rules; none if there is no file. Raises ValueError for an invalid file."""
    if directory is None:
        return ()
    try:
        data: Any = json.loads((directory / FILE).read_text(encoding="utf-8"))
    except OSError:
        return ()
    if not isinstance(data, list):
        raise ValueError(f"{FILE}: expected a list of rules")
    return tuple(_fault(rule) for rule in cast("list[Any]", data))


def write_faults(directory: Path, faults: Iterable[Mapping[str, object]]) -> None:
    """Replaces all rules. Raises ValueError for an invalid rule."""
    rules = [dict(fault) for fault in faults]
    for rule in rules:
        _fault(rule)
    vram.write_json(directory / FILE, rules)


def _fault(rule: Any) -> Fault:
    if not isinstance(rule, dict):
        raise ValueError(f"{FILE}: a rule is an object, got {rule!r}")
    fields = cast("dict[str, Any]", rule)
    unknown = set(fields) - _KEYS
    if unknown:
        raise ValueError(f"{FILE}: no key {min(unknown)!r}; valid keys: {', '.join(sorted(_KEYS))}")
    if fields.get("server") not in (None, *_SERVER_FAULTS):
        raise ValueError(f"{FILE}: server: {fields['server']!r} is none of {', '.join(_SERVER_FAULTS)}")
    if fields.get("unload") not in (None, *_UNLOAD_FAULTS):
        raise ValueError(f"{FILE}: unload: {fields['unload']!r} is none of {', '.join(_UNLOAD_FAULTS)}")
    for key in ("temperature_celsius", "xid", "ecc_errors"):
        number = fields.get(key, 0)
        if isinstance(number, bool) or not isinstance(number, int):
            raise ValueError(f"{FILE}: {key}: expected a whole number, got {number!r}")
    slow = fields.get("slow", 1.0)
    if isinstance(slow, bool) or not isinstance(slow, int | float) or not slow > 0:
        raise ValueError(f"{FILE}: slow: expected a number above 0, got {slow!r}")
    return Fault(**fields)


def _matches_server(fault: Fault, instance: str, gpus: Iterable[str]) -> bool:
    if fault.instance is not None and fault.instance != instance:
        return False
    return fault.gpu is None or any(gpu.startswith(fault.gpu) for gpu in gpus)


def server_fault(faults: Iterable[Fault], instance: str, gpus: Iterable[str]) -> str | None:
    """The fault of the server itself, if any."""
    visible_gpus = tuple(gpus)
    return next(
        (fault.server for fault in faults if fault.server and _matches_server(fault, instance, visible_gpus)), None
    )


def behaviour(faults: Iterable[Fault], instance: str, gpus: Iterable[str], model: str) -> Behaviour:
    """Combined faults of a model, given by its shortest name. Matching rules add up."""
    visible_gpus = tuple(gpus)
    matching = [
        fault for fault in faults if _matches_server(fault, instance, visible_gpus) and _matches_model(fault, model)
    ]
    return Behaviour(
        slow=max((fault.slow for fault in matching), default=1.0),
        hang=any(fault.hang for fault in matching),
        die=any(fault.die for fault in matching),
        oom=any(fault.oom for fault in matching),
        lose_slot=any(fault.lose_slot for fault in matching),
        unload=next((fault.unload for fault in matching if fault.unload), None),
    )


def _matches_model(fault: Fault, model: str) -> bool:
    if fault.model is None:
        return True
    try:
        return parse_name(fault.model).shortest == model
    except ValueError:
        return False
