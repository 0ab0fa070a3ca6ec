"""Loads of real servers as the estimator is asked about them: docs/measured/loads.json, read for the tests."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from router.domain.footprint import Footprint
from router.domain.model import ModelFacts
from router.engines.ollama.architectures import Backend
from router.engines.ollama.client import ShowReply, TagRow
from router.engines.ollama.memory_estimate import (
    LayerSplit,
    LoadParameters,
    batch_tokens,
    even_split,
    footprint,
    uses_flash_attention,
)
from router.engines.ollama.model_metadata import read_facts

MIB = 1024**2
_FILE = Path(__file__).parents[3] / "docs" / "measured" / "loads.json"
_ENGINE = "Ollama engine"


@dataclass(frozen=True)
class MeasuredLoad:
    """One load, with what the estimator says of it."""

    id: str
    kind: str
    facts: ModelFacts
    measured: dict[str, Any]
    estimate: Footprint
    backend: Backend
    gpus: int
    parameters: LoadParameters
    flash_attention: bool

    @property
    def host_bytes(self) -> int:
        """What `/api/ps` up to 0.24 counts and no GPU holds: the input embedding table."""
        return self.facts.input_bytes or 0


@cache
def measured_loads() -> tuple[MeasuredLoad, ...]:
    """All loads of the file, in its order."""
    data = json.loads(_FILE.read_text(encoding="utf-8"))
    facts = {name: _facts(name, model) for name, model in data["models"].items()}
    return tuple(_load(case, facts[case["model"]]) for case in data["cases"])


def _facts(name: str, model: dict[str, Any]) -> ModelFacts:
    tag = msgspec.convert({"name": name, "digest": "d", "size": model["size_bytes"]}, TagRow)
    reply = {"modelfile": f"FROM /models/blobs/sha256-{'0' * 64}", **{k: model[k] for k in _SHOWN}}
    found = read_facts(tag, msgspec.json.decode(json.dumps(reply), type=ShowReply))
    assert found is not None
    return found


_SHOWN = ("model_info", "tensors", "capabilities")


def _load(case: dict[str, Any], facts: ModelFacts) -> MeasuredLoad:
    slots = 1 if facts.is_embedding else case["num_parallel"]
    context, version, flash = case["context_length"], case["ollama_version"], case["flash_attention"]
    backend = Backend.OLLAMA_ENGINE if case["engine"] == _ENGINE else Backend.LLAMA_CPP
    batch = case["batch"] or batch_tokens(facts, context, slots, version, flash)
    load = LoadParameters(context, slots, case["kv_cache_type"], flash, batch, version, backend)
    split = even_split(facts.layers, case["gpus"])
    if case["layers_by_gpu"] is not None:
        split = LayerSplit(tuple(case["layers_by_gpu"][0]), case["layers_by_gpu"][1])
    estimate = footprint(facts, split, load)
    used = uses_flash_attention(facts, flash, version)
    return MeasuredLoad(case["id"], case["kind"], facts, case["measured"], estimate, backend, case["gpus"], load, used)
