"""What the weights of a model in the EMULATED store mean for its size, speed and abilities. Pure."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, cast

from router.domain.model import BlobDigest, ModelFacts
from router.engines.ollama.ggml_types import tensor_bytes
from router.engines.ollama.runner_options import runner_parameters
from router.lab.emulator.store import Header, Stored

_OUTPUT = frozenset(("output.weight", "output_norm.weight"))


def architecture(header: Header) -> str:
    return str(header.metadata.get("general.architecture", "llama"))


def number(header: Header, key: str, default: int = 0) -> int:
    """An architecture's own number, such as `block_count`; the largest of several."""
    value: Any = header.metadata.get(f"{architecture(header)}.{key}", default)
    if isinstance(value, list | tuple):
        return max((int(one) for one in cast("list[int]", value)), default=default)
    return int(value) if isinstance(value, int | float) else default


def facts_of(stored: Stored, header: Header) -> ModelFacts:
    """The facts of a stored model, read as a server reads them."""
    layers = number(header, "block_count", 1)
    heads = number(header, "attention.head_count", 1)
    width = number(header, "embedding_length", 64)
    head_width = width // max(1, heads)
    ends = {name: tensor_bytes(kind, shape) or 0 for name, kind, shape in header.tensors if "blk." not in name}
    is_tied = bool(ends) and "output.weight" not in ends and not _is_encoder(ends)
    table = ends.get("token_embd.weight")
    output = sum(size for name, size in ends.items() if name in _OUTPUT)
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
        input_bytes=0 if is_tied else table,
        output_bytes=(output + (table or 0) if is_tied else output) if ends else None,
        parameters=runner_parameters((name, json.dumps(value)) for name, value in stored.parameters.items()),
    )


def _kv_heads(header: Header, layers: int, heads: int) -> tuple[int, ...]:
    value: Any = header.metadata.get(f"{architecture(header)}.attention.head_count_kv", heads)
    if isinstance(value, list | tuple):
        return tuple(int(one) for one in cast("list[int]", value))
    return (int(value),) * layers


def _is_encoder(names: Mapping[str, int]) -> bool:
    return any(name.startswith("token_embd_norm") for name in names)


def is_embedding(header: Header) -> bool:
    return f"{architecture(header)}.pooling_type" in header.metadata


def active_share(header: Header) -> float:
    """The share of the weights that one token uses: below 1 for mixtures of experts."""
    many, used = number(header, "expert_count"), number(header, "expert_used_count")
    if not many or not used:
        return 1.0
    sizes = {name: tensor_bytes(kind, shape) or math.prod(shape) for name, kind, shape in header.tensors}
    experts = sum(size for name, size in sizes.items() if "_exps." in name)
    return 1.0 - experts / max(1, sum(sizes.values())) * (1.0 - used / many)


def capabilities(stored: Stored, header: Header) -> tuple[str, ...]:
    """In the order in which `/api/show` lists them."""
    if is_embedding(header):
        return ("embedding",)
    found = ["completion"]
    found += ["tools"] if ".Tools" in stored.template else []
    found += ["insert"] if ".Suffix" in stored.template else []
    found += ["thinking"] if ".Think" in stored.template else []
    return tuple(found)
