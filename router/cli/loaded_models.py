"""The models of a status document with their GPUs, expiry and pin, as `ps`, `load` and `unload` show them. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from router.domain.model_names import shortest

GIB = 1024**3


def loaded_models(status: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One object for each replica, by name; its keys are listed in docs/operations.md and only ever added to."""
    indexes = {str(gpu["uuid"]): str(gpu["index"]) for gpu in status.get("gpus") or ()}
    gpus = {
        str(view["name"]): [indexes.get(str(uuid), str(uuid)) for uuid in view.get("gpus") or ()]
        for view in status.get("instances") or ()
    }
    attached = {str(view["name"]) for view in status.get("instances") or () if view.get("attached")}
    rows = [
        _model(row, gpus.get(str(row["instance"]), []), is_attached=str(row["instance"]) in attached)
        for row in status.get("models") or ()
    ]
    return sorted(rows, key=lambda row: (row["model"], row["instance"]))


def rows_of(rows: Sequence[dict[str, Any]], model: str) -> list[dict[str, Any]]:
    """The replicas of a model, by its name in any form."""
    return [row for row in rows if row["model"] == _shortest(model)]


def _shortest(name: str) -> str:
    try:
        return shortest(name)
    except ValueError:
        return name


def _model(row: Mapping[str, Any], gpus: list[str], *, is_attached: bool) -> dict[str, Any]:
    return {
        "model": row["name"],
        "instance": row["instance"],
        "gpus": gpus,
        "attached": is_attached,
        "always_loaded": bool(row.get("always_loaded")),
        "state": row["state"],
        "size_bytes": row.get("size_bytes") or sum(row.get("per_gpu_bytes") or ()),
        "in_flight": row["in_flight"],
        "slots": row["slots"],
        "context_length": row["context_length"],
        "expires_in_seconds": row.get("expires_in_seconds"),
        "pin": row.get("pin"),
        "reason": row.get("reason") or "",
    }


def is_kept_warm(row: Mapping[str, Any]) -> bool:
    """Whether the configuration keeps the model loaded."""
    pin: Mapping[str, Any] = row.get("pin") or {}
    return bool(pin.get("keep_warm"))


def where(row: Mapping[str, Any]) -> str:
    """`gpu0+gpu1 (GPU 0, 1)`; `cpu (CPU)`; `box2`, whose GPUs are not known here."""
    if row["attached"] and not row["gpus"]:
        return str(row["instance"])
    gpus = f"GPU {', '.join(row['gpus'])}" if row["gpus"] else "CPU"
    return f"{row['instance']} ({gpus})"
