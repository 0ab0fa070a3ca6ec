"""Size, speed and capabilities of a model in the EMULATED store, derived from its weights header. Pure."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, cast

from router.domain.model import BlobDigest, ModelFacts
from router.engines.ollama.ggml_types import tensor_bytes
from router.engines.ollama.runner_options import runner_parameters
from router.lab.emulator.store import Header, StoredModel

_OUTPUT = frozenset(("output.weight", "output_norm.weight"))


def architecture(header: Header) -> str:
    return str(header.metadata.get("general.architecture", "llama"))


def number(header: Header, key: str, default: int = 0) -> int:
    """An architecture-specific number such as `block_count`; the maximum if it is a list."""
    value: Any = header.metadata.get(f"{architecture(header)}.{key}", default)
    if isinstance(value, list | tuple):
        return max((int(item) for item in cast("list[int]", value)), default=default)
    return int(value) if isinstance(value, int | float) else default


def facts_of(stored: StoredModel, header: Header) -> ModelFacts:
    """Facts of a stored model, computed as a server computes them."""
    layers = number(header, "block_count", 1)
    heads = number(header, "attention.head_count", 1)
    width = number(header, "embedding_length", 64)
    head_width = width // max(1, heads)
    non_block_bytes = {
        name: tensor_bytes(kind, shape) or 0 for name, kind, shape in header.tensors if "blk." not in name
    }
    is_tied = bool(non_block_bytes) and "output.weight" not in non_block_bytes and not _is_encoder(non_block_bytes)
    embedding_bytes = non_block_bytes.get("token_embd.weight")
    output_bytes = sum(size for name, size in non_block_bytes.items() if name in _OUTPUT)
    return ModelFacts(
        name=stored.name.shortest,
        digest=stored.digest,
        blob=BlobDigest(stored.weights.digest),
        weights_bytes=stored.weights.size,
        architecture=architecture(header),
        layers=layers,
        embedding_length=width,
        head_count=heads,
        head_count_kv=_kv_heads(header, layers, heads),
        key_length=number(header, "attention.key_length", head_width),
        value_length=number(header, "attention.value_length", head_width),
        vocabulary_size=number(header, "vocab_size", 32_000),
        context_length=number(header, "context_length", 4096),
        sliding_window=number(header, "attention.sliding_window") or None,
        is_embedding=is_embedding(header),
        input_bytes=0 if is_tied else embedding_bytes,
        output_bytes=(output_bytes + (embedding_bytes or 0) if is_tied else output_bytes) if non_block_bytes else None,
        parameters=runner_parameters((name, json.dumps(value)) for name, value in stored.parameters.items()),
    )


def _kv_heads(header: Header, layers: int, heads: int) -> tuple[int, ...]:
    value: Any = header.metadata.get(f"{architecture(header)}.attention.head_count_kv", heads)
    if isinstance(value, list | tuple):
        return tuple(int(item) for item in cast("list[int]", value))
    return (int(value),) * layers


def _is_encoder(names: Mapping[str, int]) -> bool:
    return any(name.startswith("token_embd_norm") for name in names)


def is_embedding(header: Header) -> bool:
    return f"{architecture(header)}.pooling_type" in header.metadata


def active_share(header: Header) -> float:
    """Share of the weights used per token: below 1 for mixture-of-experts models."""
    expert_count, used_count = number(header, "expert_count"), number(header, "expert_used_count")
    if not expert_count or not used_count:
        return 1.0
    sizes = {name: tensor_bytes(kind, shape) or math.prod(shape) for name, kind, shape in header.tensors}
    experts = sum(size for name, size in sizes.items() if "_exps." in name)
    return 1.0 - experts / max(1, sum(sizes.values())) * (1.0 - used_count / expert_count)


def capabilities(stored: StoredModel, header: Header) -> tuple[str, ...]:
    """Capabilities in the order of `/api/show`."""
    if is_embedding(header):
        return ("embedding",)
    names = ["completion"]
    names += ["tools"] if ".Tools" in stored.template else []
    names += ["insert"] if ".Suffix" in stored.template else []
    names += ["thinking"] if ".Think" in stored.template else []
    return tuple(names)
