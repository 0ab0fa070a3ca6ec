"""`POST /llamayard/pin` and `/llamayard/unpin`: where a model must run, until the router restarts.

Also how pins are shown in the status document.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import msgspec

from router.api.attached_models import is_of_attached_engine
from router.api.context import ApiContext
from router.api.explain import imagined_request
from router.api.operator_commands import gpu_named
from router.domain.model_names import shortest
from router.domain.policy import Pin
from router.domain.snapshot import Snapshot
from router.errors import UNREADABLE_JSON, BadRequest, ShuttingDown
from router.scheduler.placement.explain import gpu_label

PIN, UNPIN = "/llamayard/pin", "/llamayard/unpin"
ChangePin = Callable[[str, tuple[str, ...]], Awaitable[Sequence[str]]]
"""Pins a model to GPUs by UUID, or to none; returns warnings. Raises BadRequest if that contradicts other rules."""
_FORMS = 'send {"model": "NAME", "gpus": [0]}; unpin takes {"model": "NAME"}'


class _Command(msgspec.Struct, forbid_unknown_fields=True):
    model: str
    gpus: list[int | str] = []
    """Indexes or UUIDs, or beginnings of UUIDs."""


async def change_pin(body: bytes, route: str, context: ApiContext, change: ChangePin) -> Mapping[str, Any]:
    """Carries the command out: `model`, `pin` (null: none), `warnings[]`.

    Raises:
        BadRequest: the body is wrong, or the pin contradicts other rules or does not fit; nothing has changed.
        ModelNotFound: no server has the model.
    """
    command = _parsed(body, route)
    if context.controller.is_closing:
        raise ShuttingDown("the router is shutting down")
    name = await _model(context, command.model, must_exist=route == PIN)
    snapshot = context.controller.snapshot()
    gpus = tuple(gpu_named(snapshot, str(each)) for each in command.gpus)
    if len(set(gpus)) != len(gpus):
        raise BadRequest(f"gpus: {', '.join(map(str, command.gpus))} name one GPU twice")
    warnings = await change(name, gpus)
    return {
        "model": name,
        "pin": pin_document(context.controller.snapshot(), name),
        "warnings": list(warnings),
    }


def _parsed(body: bytes, route: str) -> _Command:
    try:
        command = msgspec.json.decode(body.strip() or b"{}", type=_Command)
    except UNREADABLE_JSON as error:
        raise BadRequest(f"the body is no command: {error}; {_FORMS}") from error
    if not command.model.strip():
        raise BadRequest(f"model: missing; {_FORMS}")
    if route == UNPIN and command.gpus:
        raise BadRequest(f"gpus: unpin takes no GPUs; {_FORMS}")
    if route == PIN and not command.gpus:
        raise BadRequest(f"gpus: missing; {_FORMS}")
    return command


async def _model(context: ApiContext, written: str, *, must_exist: bool) -> str:
    """The shortest name of the model that the router would serve under that name."""
    request = imagined_request(context, {"model": written})
    if must_exist and is_of_attached_engine(await context.required_model(request.model)):
        raise BadRequest(f"model '{request.model}' is served by an attached server, which decides where it runs")
    try:
        return shortest(request.model)
    except ValueError as error:
        raise BadRequest(f"model: {error}") from error


def pin_document(snapshot: Snapshot, model: str) -> dict[str, Any] | None:
    """The rules of a model that say where it is and whether it stays; None without such rules.

    `origin`: `configuration`; or `run time`, until the router restarts, if the GPUs, or that there are none, come from
    a command.
    """
    pin = snapshot.policy.pins.get(model)
    return None if pin is None or not _says_where(pin) else _document(snapshot, pin)


def pin_documents(snapshot: Snapshot) -> list[dict[str, Any]]:
    """The same of all models, with their names, by name."""
    pins = sorted(snapshot.policy.pins.items())
    return [{"model": name, **_document(snapshot, pin)} for name, pin in pins if _says_where(pin)]


def _says_where(pin: Pin) -> bool:
    return bool(pin.gpus or pin.spread or pin.cpu or pin.keep_warm or pin.is_run_time)


def _document(snapshot: Snapshot, pin: Pin) -> dict[str, Any]:
    return {
        "gpus": [gpu_label(snapshot, gpu) for gpu in pin.gpus],
        "layout": "cpu" if pin.cpu else "spread" if pin.spread else "auto",
        "keep_warm": pin.keep_warm,
        "origin": "run time" if pin.is_run_time else "configuration",
    }
