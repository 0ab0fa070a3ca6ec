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

from router.engines.ollama.gguf_header import FILE_TYPES

MAGIC = "llamayard emulated weights"

Tensor = tuple[str, str, tuple[int, ...]]
"""Name, ggml type and shape, row length first."""

_HIGH_PRECISION_TYPES: Mapping[str, str] = {"Q4_K_M": "Q6_K"}
_BASE_TYPES: Mapping[str, str] = {"Q4_K_M": "Q4_K"}
_SMALL_BLOCK_TYPES: Mapping[str, str] = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}
_ENCODERS = ("bert", "nomic-bert")


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
    tensors: tuple[Tensor, ...]


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
    is_encoder = arch in _ENCODERS
    general: dict[str, Any] = {
        "general.architecture": arch,
        "general.basename": name.partition(":")[0],
        "general.file_type": next(number for number, kind in FILE_TYPES.items() if kind == facts["quant"]),
        "general.parameter_count": facts["parameters"],
        "general.quantization_version": 2,
        "tokenizer.ggml.model": "bert" if is_encoder else "gpt2",
    }
    of_architecture = _attention_metadata(facts) | _special_metadata(facts)
    return general | {f"{arch}.{key}": value for key, value in of_architecture.items()}


def _attention_metadata(facts: Mapping[str, Any]) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        "block_count": facts["layers"],
        "context_length": facts["context"],
        "embedding_length": facts["width"],
        "feed_forward_length": facts["ff"],
        "attention.head_count": facts["heads"],
        "attention.head_count_kv": _kv_heads(facts) if isinstance(facts["kv"], list) else facts["kv"],
        "vocab_size": facts["vocabulary"],
    }
    if facts["arch"] in _ENCODERS:
        metadata.pop("attention.head_count_kv")
    elif facts["arch"] not in ("qwen2", "phi3", "qwen25vl"):
        metadata |= {"attention.key_length": facts["key"], "attention.value_length": facts["key"]}
    if "window" in facts:
        metadata["attention.sliding_window"] = facts["window"]
    if "key_swa" in facts:
        metadata |= {"attention.key_length_swa": facts["key_swa"], "attention.value_length_swa": facts["key_swa"]}
    if "shared_kv" in facts:
        metadata["attention.shared_kv_layers"] = facts["shared_kv"]
    return metadata


def _special_metadata(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Experts, recurrent states, encoders and pooling."""
    metadata: dict[str, Any] = {}
    if "experts" in facts:
        metadata |= {"expert_count": facts["experts"][0], "expert_used_count": facts["experts"][1]}
        metadata |= {"expert_feed_forward_length": facts["experts"][2]} if len(facts["experts"]) > 2 else {}
    if "ssm" in facts:
        names = ("conv_kernel", "state_size", "group_count", "inner_size", "time_step_rank")
        metadata["full_attention_interval"] = facts["full_attention_every"]
        metadata |= {f"ssm.{name}": value for name, value in zip(names, facts["ssm"], strict=True)}
    if "vision" in facts:
        blocks, width, _ = facts["vision"]
        metadata |= {"vision.block_count": blocks, "vision.embedding_length": width}
    if facts["arch"] in _ENCODERS or "pooling" in facts:
        metadata["pooling_type"] = facts.get("pooling", 1)
    return metadata


def _kv_heads(facts: Mapping[str, Any]) -> list[int]:
    """KV heads of each layer."""
    kv: object = facts["kv"]
    pattern = cast("list[int]", kv if isinstance(kv, list) else [kv])
    return [pattern[layer % len(pattern)] for layer in range(facts["layers"])]


@dataclass(frozen=True, slots=True)
class _Types:
    """Tensor types of a model."""

    table: str
    base: str
    fine: str
    """Of the value and down matrices of half of the layers."""
    experts: str

    def matrix(self, name: str, width: int, rows: int, *more: int, fine: bool = False) -> Tensor:
        """A matrix. Rows that do not fill a K-quant's blocks get the next type with small blocks, as in llama.cpp."""
        kind = self.fine if fine else self.experts if more else self.base
        return (name, _SMALL_BLOCK_TYPES.get(kind, kind) if width % 256 else kind, (width, rows, *more))


def _types(facts: Mapping[str, Any]) -> _Types:
    quant: str = facts["quant"]
    base = _BASE_TYPES.get(quant, quant)
    fine = _HIGH_PRECISION_TYPES.get(quant, base)
    table = _HIGH_PRECISION_TYPES.get(quant, quant if quant in ("F16", "Q8_0") else "Q6_K")
    experts = quant if quant == "MXFP4" else base
    if "types" in facts:
        table, base, fine = facts["types"]
        fine = "MXFP4" if quant == "MXFP4" and "experts" in facts else fine
    return _Types(table, base, fine, experts)


def _tensors(facts: Mapping[str, Any]) -> list[Tensor]:
    """Tensor names, types and shapes in llama.cpp's naming.

    Q4_K_M stores half of the value and down matrices at higher precision.
    """
    types, width, vocabulary = _types(facts), facts["width"], facts["vocabulary"]
    tied, is_encoder = facts.get("tied", False), facts["arch"] in _ENCODERS
    untied_type = types.base if "types" not in facts else types.table
    tensors: list[Tensor] = [("token_embd.weight", types.table if tied else untied_type, (width, vocabulary))]
    if facts["arch"] == "bert":
        tensors += [("position_embd.weight", "F32", (width, facts["context"]))]
    if is_encoder:
        tensors += [("token_embd_norm.weight", "F32", (width,))] if facts["arch"] == "bert" else []
    if "table_layers" in facts:
        row = facts["table_layers"] * facts["layers"]
        tensors.append(("per_layer_token_embd.weight", "Q5_K", (row, vocabulary)))
    for layer in range(facts["layers"]):
        tensors += _layer(facts, types, layer)
    if not is_encoder:
        tensors.append(("output_norm.weight", "F32", (width,)))
        tensors += [] if tied else [("output.weight", types.table, (width, vocabulary))]
    if "vision" in facts:
        _, encoder_width, size = facts["vision"]
        tensors.append(("v.blk.weight", "F16", (encoder_width, round(size / 2 / encoder_width))))
    return tensors


def _layer(facts: Mapping[str, Any], types: _Types, layer: int) -> list[Tensor]:
    width, count, block = facts["width"], facts["layers"], f"blk.{layer}."
    is_fine = layer < count // 8 or layer >= 7 * count // 8 or layer % 3 == 2
    norms: list[Tensor] = [(block + "attn_norm.weight", "F32", (width,)), (block + "ffn_norm.weight", "F32", (width,))]
    every = facts.get("full_attention_every", 1)
    is_attention = (layer + 1) % every == 0
    mixer = _attention(facts, types, layer, block, fine=is_fine) if is_attention else _recurrent(facts, types, block)
    return [*norms, *mixer, *_feed_forward(facts, types, block, fine=is_fine)]


def _attention(facts: Mapping[str, Any], types: _Types, layer: int, block: str, *, fine: bool) -> list[Tensor]:
    width, kv_heads = facts["width"], _kv_heads(facts)[layer]
    slides = "key_swa" in facts and (layer + 1) % 6 != 0
    key = facts["key_swa"] if slides else facts["key"]
    heads = facts["heads"] * key
    value = types.matrix(block + "attn_v.weight", width, kv_heads * key, fine=fine and types.experts != "MXFP4")
    if "value_type" in facts:
        value = (value[0], facts["value_type"], value[2])
    gate = 2 if "ssm" in facts else 1  # the query of these hybrids comes with a gate
    return [
        types.matrix(block + "attn_q.weight", width, heads * gate),
        types.matrix(block + "attn_k.weight", width, kv_heads * key),
        value,
        types.matrix(block + "attn_output.weight", heads, width),
    ]


def _recurrent(facts: Mapping[str, Any], types: _Types, block: str) -> list[Tensor]:
    width = facts["width"]
    kernel, state, groups, inner, rank = facts["ssm"]
    mixed = 2 * groups * state + inner
    return [
        types.matrix(block + "attn_qkv.weight", width, mixed),
        types.matrix(block + "attn_gate.weight", width, inner),
        types.matrix(block + "ssm_out.weight", inner, width),
        (block + "ssm_conv1d.weight", "F32", (kernel, mixed)),
        (block + "ssm_ba.weight", "F32", (width, 2 * rank)),
    ]


def _feed_forward(facts: Mapping[str, Any], types: _Types, block: str, *, fine: bool) -> list[Tensor]:
    width, hidden = facts["width"], facts["ff"]
    found: list[Tensor] = []
    if "experts" in facts:
        experts, _, *rest = facts["experts"]
        each = rest[0] if rest else hidden
        found = [
            (block + "ffn_gate_inp.weight", "F32", (width, experts)),
            types.matrix(block + "ffn_gate_exps.weight", width, each, experts),
            types.matrix(block + "ffn_up_exps.weight", width, each, experts),
            types.matrix(block + "ffn_down_exps.weight", each, width, experts, fine=fine),
        ]
        if "dense" not in rest:
            return found
    gate = [] if facts["arch"] == "bert" else [types.matrix(block + "ffn_gate.weight", width, hidden)]
    return [
        *found,
        *gate,
        types.matrix(block + "ffn_up.weight", width, hidden),
        types.matrix(block + "ffn_down.weight", hidden, width, fine=fine),
    ]
