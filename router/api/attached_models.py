"""How the models of servers that are not Ollama appear in Ollama's and OpenAI's lists.

What only Ollama knows of a model (sizes, a template, a digest of its files) is empty. `llamayard.engine` says what
serves it.
"""

from __future__ import annotations

from typing import Any

from router.api.context import ApiContext
from router.domain.instance import InstanceView
from router.domain.model import ModelFacts
from router.engines.ollama.rules import KIND as OLLAMA

_Row = dict[str, Any]
_LONG_AGO = "1970-01-01T00:00:00Z"
"""Clients parse the time of a model's last change, which nobody knows here."""


def is_of_attached_engine(facts: ModelFacts) -> bool:
    """Whether a server that is not Ollama, and that the router does not start, has the model loaded all the time."""
    return facts.engine != OLLAMA and not facts.is_shared


def listed_rows(context: ApiContext, field: str) -> list[_Row]:
    """Rows of `/api/tags` for the field `models`, of `/v1/models` for `data`."""
    rows = _v1_row if field == "data" else _tag_row
    return [rows(context, facts) for facts in context.attached.all]


def loaded_rows(context: ApiContext) -> list[tuple[InstanceView, _Row]]:
    """Rows of `/api/ps`, each with its server: all models of each that answers; of a server that the router starts, the
    model while it is loaded."""
    loaded = context.controller.snapshot().residencies
    rows: list[tuple[InstanceView, _Row]] = []
    for view in context.ready_instances():
        for facts in context.attached.on(view.spec.name):
            residency = loaded.get((view.spec.name, facts.blob))
            if residency is None and facts.is_shared:
                continue
            size = 0 if residency is None else sum(residency.per_gpu_bytes)
            row = {"size": size, "size_vram": size, "context_length": facts.context_length}
            rows.append((view, {**_tag_row(context, facts), **row}))
    return rows


def shown(context: ApiContext, facts: ModelFacts, *, in_path: bool) -> _Row:
    """The answer to `/api/show`, or, `in_path`, to `/v1/models/NAME`."""
    if in_path:
        return _v1_row(context, facts)
    details: _Row = _tag_row(context, facts)["details"]
    info: _Row = {"general.architecture": "unknown"}
    if facts.context_length:
        info["unknown.context_length"] = facts.context_length
    servers = context.attached.servers_of(facts)
    kept = [each for each in servers[0].capabilities if all(each in server.capabilities for server in servers)]
    return {
        "modelfile": "",
        "parameters": "",
        "template": "",
        "details": details,
        "model_info": info,
        "capabilities": kept,
        "modified_at": _LONG_AGO,
        "llamayard": _note(context, facts),
    }


def _tag_row(context: ApiContext, facts: ModelFacts) -> _Row:
    details: _Row = {
        "parent_model": "", "format": "", "family": "", "families": None, "parameter_size": "",
        "quantization_level": "",
    }  # fmt: skip
    return {
        "name": facts.name,
        "model": facts.name,
        "modified_at": _LONG_AGO,
        "size": 0,
        "digest": facts.digest,
        "details": details,
        "llamayard": _note(context, facts),
    }


def _v1_row(context: ApiContext, facts: ModelFacts) -> _Row:
    return {
        "id": facts.name,
        "object": "model",
        "created": 0,
        "owned_by": "library",
        "llamayard": _note(context, facts),
    }


def _note(context: ApiContext, facts: ModelFacts) -> _Row:
    servers = context.attached.servers_of(facts)
    return {"engine": servers[0].kind, "instances": [server.name for server in servers]}
