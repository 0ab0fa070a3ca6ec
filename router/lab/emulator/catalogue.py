"""The catalogue of the EMULATED rig: facts of well-known models as the weights file of each would tell them.

`weights_text` makes a small JSON text that stands for the weights in a store; it holds a header, no weight. Nothing
here touches a store.
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

_FINE: Mapping[str, str] = {"Q4_K_M": "Q6_K"}
_PLAIN: Mapping[str, str] = {"Q4_K_M": "Q4_K"}


@dataclass(frozen=True, slots=True)
class CatalogueModel:
    """One model of the catalogue."""

    name: str
    size_bytes: int
    """All of it, as `/api/tags` says."""
    label: str
    quantisation: str
    capabilities: tuple[str, ...]
    metadata: Mapping[str, Any]
    tensors: tuple[tuple[str, str, tuple[int, ...]], ...]


@cache
def catalogue() -> Mapping[str, CatalogueModel]:
    """All models, by their shortest name with tag."""
    text = (Path(__file__).parent / "catalogue.yaml").read_text(encoding="utf-8")
    data = cast("dict[str, dict[str, Any]]", yaml.safe_load(text))
    return {name: _entry(name, facts) for name, facts in data.items()}


def weights_text(entry: CatalogueModel) -> str:
    """What stands for the weights file: the same text for the same model, so that its digest is stable."""
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
    own: dict[str, Any] = {
        "block_count": facts["layers"],
        "context_length": facts["context"],
        "embedding_length": facts["width"],
        "feed_forward_length": facts["ff"],
        "attention.head_count": facts["heads"],
        "attention.head_count_kv": facts["kv"],
        "vocab_size": facts["vocabulary"],
    }
    if arch in ("llama", "gemma2"):
        own |= {"attention.key_length": facts["key"], "attention.value_length": facts["key"]}
    if "window" in facts:
        own["attention.sliding_window"] = facts["window"]
    if "experts" in facts:
        own |= {"expert_count": facts["experts"][0], "expert_used_count": facts["experts"][1]}
    if arch == "nomic-bert":
        own.pop("attention.head_count_kv")
        own["pooling_type"] = 1
    general: dict[str, Any] = {
        "general.architecture": arch,
        "general.basename": name.partition(":")[0],
        "general.file_type": {"Q4_K_M": 15, "Q4_0": 2, "F16": 1}[facts["quant"]],
        "general.parameter_count": facts["parameters"],
        "general.quantization_version": 2,
        "tokenizer.ggml.model": "bert" if arch == "nomic-bert" else "gpt2",
    }
    return general | {f"{arch}.{key}": value for key, value in own.items()}


def _tensors(facts: Mapping[str, Any]) -> list[tuple[str, str, tuple[int, ...]]]:
    """Names, types and shapes after llama.cpp's naming; Q4_K_M keeps half of the value and down matrices finer."""
    quant: str = facts["quant"]
    width: int = facts["width"]
    wide: int = facts["ff"]
    plain, kv, heads = _PLAIN.get(quant, quant), facts["kv"] * facts["key"], facts["heads"] * facts["key"]
    tied = facts.get("tied", False)
    finest = _FINE.get(quant, "F16" if quant == "F16" else "Q6_K")
    found: list[tuple[str, str, tuple[int, ...]]] = [
        ("token_embd.weight", finest if tied else plain, (width, facts["vocabulary"]))
    ]
    for layer in range(facts["layers"]):
        count = facts["layers"]
        is_fine = layer < count // 8 or layer >= 7 * count // 8 or layer % 3 == 2
        fine = _FINE.get(quant, plain) if is_fine else plain
        block = f"blk.{layer}."
        found += [
            (block + "attn_norm.weight", "F32", (width,)),
            (block + "attn_q.weight", plain, (width, heads)),
            (block + "attn_k.weight", plain, (width, kv)),
            (block + "attn_v.weight", fine, (width, kv)),
            (block + "attn_output.weight", plain, (heads, width)),
            (block + "ffn_norm.weight", "F32", (width,)),
        ]
        found += _feed_forward(facts, block, plain, fine, width, wide)
    if facts["arch"] != "nomic-bert":
        found.append(("output_norm.weight", "F32", (width,)))
        found += [] if tied else [("output.weight", finest, (width, facts["vocabulary"]))]
    return found


def _feed_forward(
    facts: Mapping[str, Any], block: str, plain: str, fine: str, width: int, wide: int
) -> list[tuple[str, str, tuple[int, ...]]]:
    if "experts" in facts:
        many = facts["experts"][0]
        return [
            (block + "ffn_gate_inp.weight", "F32", (width, many)),
            (block + "ffn_gate_exps.weight", plain, (width, wide, many)),
            (block + "ffn_up_exps.weight", plain, (width, wide, many)),
            (block + "ffn_down_exps.weight", fine, (wide, width, many)),
        ]
    gate = [(block + "ffn_gate.weight", plain, (width, wide))]
    rest = [(block + "ffn_up.weight", plain, (width, wide)), (block + "ffn_down.weight", fine, (wide, width))]
    return gate + rest
