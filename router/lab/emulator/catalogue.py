"""Catalogue of the EMULATED machine: metadata of well-known models, as in their weights files.

`weights_text` makes a small JSON placeholder for a weights file: it holds the header but no weights. Nothing here
touches a store.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import yaml

MAGIC = "llamayard emulated weights"

_HIGH_PRECISION_TYPES: Mapping[str, str] = {"Q4_K_M": "Q6_K"}
_BASE_TYPES: Mapping[str, str] = {"Q4_K_M": "Q4_K"}


@dataclass(frozen=True, slots=True)
class CatalogueModel:
    """One model of the catalogue."""

    name: str
    size_bytes: int
    """Total size, as in `/api/tags`."""
    label: str
    quantisation: str
    capabilities: tuple[str, ...]
    metadata: Mapping[str, Any]
    tensors: tuple[tuple[str, str, tuple[int, ...]], ...]


@cache
def catalogue() -> Mapping[str, CatalogueModel]:
    """All models by their shortest name with tag."""
    text = (Path(__file__).parent / "catalogue.yaml").read_text(encoding="utf-8")
    data = cast("dict[str, dict[str, Any]]", yaml.safe_load(text))
    return {name: _entry(name, facts) for name, facts in data.items()}


def weights_text(entry: CatalogueModel) -> str:
    """Placeholder for the weights file; deterministic, so that its digest is stable."""
    body = {"format": MAGIC, "model": entry.name, "metadata": entry.metadata, "tensors": entry.tensors}
    return json.dumps(body, sort_keys=True)


def _entry(name: str, facts: Mapping[str, Any]) -> CatalogueModel:
    return CatalogueModel(
        name=name,
        size_bytes=facts["size"],
        label=facts["label"],
        quantisation=facts["quant"],
        capabilities=tuple(facts["capabilities"]),
        metadata=_metadata(name, facts),
        tensors=tuple(_tensors(facts)),
    )


def _metadata(name: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    arch = facts["arch"]
    architecture_metadata: dict[str, Any] = {
        "block_count": facts["layers"],
        "context_length": facts["context"],
        "embedding_length": facts["width"],
        "feed_forward_length": facts["ff"],
        "attention.head_count": facts["heads"],
        "attention.head_count_kv": facts["kv"],
        "vocab_size": facts["vocabulary"],
    }
    if arch in ("llama", "gemma2"):
        architecture_metadata |= {"attention.key_length": facts["key"], "attention.value_length": facts["key"]}
    if "window" in facts:
        architecture_metadata["attention.sliding_window"] = facts["window"]
    if "experts" in facts:
        architecture_metadata |= {"expert_count": facts["experts"][0], "expert_used_count": facts["experts"][1]}
    if arch == "nomic-bert":
        architecture_metadata.pop("attention.head_count_kv")
        architecture_metadata["pooling_type"] = 1
    general: dict[str, Any] = {
        "general.architecture": arch,
        "general.basename": name.partition(":")[0],
        "general.file_type": {"Q4_K_M": 15, "Q4_0": 2, "F16": 1}[facts["quant"]],
        "general.parameter_count": facts["parameters"],
        "general.quantization_version": 2,
        "tokenizer.ggml.model": "bert" if arch == "nomic-bert" else "gpt2",
    }
    return general | {f"{arch}.{key}": value for key, value in architecture_metadata.items()}


def _tensors(facts: Mapping[str, Any]) -> list[tuple[str, str, tuple[int, ...]]]:
    """Tensor names, types and shapes in llama.cpp's naming.

    Q4_K_M stores half of the value and down matrices at higher precision.
    """
    quant: str = facts["quant"]
    width: int = facts["width"]
    hidden_width: int = facts["ff"]
    base_type, kv, heads = _BASE_TYPES.get(quant, quant), facts["kv"] * facts["key"], facts["heads"] * facts["key"]
    tied = facts.get("tied", False)
    embedding_type = _HIGH_PRECISION_TYPES.get(quant, "F16" if quant == "F16" else "Q6_K")
    tensors: list[tuple[str, str, tuple[int, ...]]] = [
        ("token_embd.weight", embedding_type if tied else base_type, (width, facts["vocabulary"]))
    ]
    for layer in range(facts["layers"]):
        count = facts["layers"]
        is_high_precision = layer < count // 8 or layer >= 7 * count // 8 or layer % 3 == 2
        fine_type = _HIGH_PRECISION_TYPES.get(quant, base_type) if is_high_precision else base_type
        block = f"blk.{layer}."
        tensors += [
            (block + "attn_norm.weight", "F32", (width,)),
            (block + "attn_q.weight", base_type, (width, heads)),
            (block + "attn_k.weight", base_type, (width, kv)),
            (block + "attn_v.weight", fine_type, (width, kv)),
            (block + "attn_output.weight", base_type, (heads, width)),
            (block + "ffn_norm.weight", "F32", (width,)),
        ]
        tensors += _feed_forward(facts, block, base_type, fine_type, width, hidden_width)
    if facts["arch"] != "nomic-bert":
        tensors.append(("output_norm.weight", "F32", (width,)))
        tensors += [] if tied else [("output.weight", embedding_type, (width, facts["vocabulary"]))]
    return tensors


def _feed_forward(
    facts: Mapping[str, Any], block: str, base_type: str, fine_type: str, width: int, hidden_width: int
) -> list[tuple[str, str, tuple[int, ...]]]:
    if "experts" in facts:
        expert_count = facts["experts"][0]
        return [
            (block + "ffn_gate_inp.weight", "F32", (width, expert_count)),
            (block + "ffn_gate_exps.weight", base_type, (width, hidden_width, expert_count)),
            (block + "ffn_up_exps.weight", base_type, (width, hidden_width, expert_count)),
            (block + "ffn_down_exps.weight", fine_type, (hidden_width, width, expert_count)),
        ]
    gate = [(block + "ffn_gate.weight", base_type, (width, hidden_width))]
    rest = [
        (block + "ffn_up.weight", base_type, (width, hidden_width)),
        (block + "ffn_down.weight", fine_type, (hidden_width, width)),
    ]
    return gate + rest
