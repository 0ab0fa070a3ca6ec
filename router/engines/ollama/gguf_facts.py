"""Facts of a model read from the header of its weights file, as an Ollama server computes them.

Used where no server runs: by `check-config`, and by the emulated server. A running server is asked instead
(`router/engines/ollama/model_metadata.py`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from router.domain.model import BlobDigest, ModelFacts
from router.domain.model_names import parse_name
from router.engines.ollama.blob_store import BlobStore, StoredModel
from router.engines.ollama.ggml_types import tensor_bytes
from router.engines.ollama.gguf_header import read_header
from router.engines.ollama.runner_options import runner_parameters

TensorTable = tuple[tuple[str, str, tuple[int, ...]], ...]
"""Name, type and shape of each tensor."""

_OUTPUT = frozenset(("output.weight", "output_norm.weight"))


@dataclass(frozen=True, slots=True)
class WeightsHeader:
    """Metadata and tensor table of a weights file."""

    metadata: Mapping[str, Any]
    tensors: TensorTable


def read_facts(store: BlobStore, name: str) -> ModelFacts | None:
    """Facts of the model with that name; None if it is not in the store or its weights cannot be read."""
    stored = store.get(parse_name(name))
    if stored is None:
        return None
    header = read_weights_header(store.blob(stored.weights.digest))
    return None if header is None or not header.tensors else facts_of(stored, header)


def read_weights_header(path: Path) -> WeightsHeader | None:
    """The header with the parameter count and vocabulary size that Ollama computes; None if it is no GGUF file."""
    gguf = read_header(path)
    if gguf is None:
        return None
    tensors = tuple((tensor.name, tensor.type, tensor.shape) for tensor in gguf.tensors)
    prefix = gguf.metadata.get("general.architecture", "llama")
    tokens: Any = gguf.metadata.get("tokenizer.ggml.tokens")
    vocabulary = {f"{prefix}.vocab_size": len(cast("list[str]", tokens))} if isinstance(tokens, list) else {}
    count = sum(math.prod(shape) for _, _, shape in tensors)
    return WeightsHeader({**vocabulary, **gguf.metadata, "general.parameter_count": count}, tensors)


def architecture(header: WeightsHeader) -> str:
    return str(header.metadata.get("general.architecture", "llama"))


def number(header: WeightsHeader, key: str, default: int = 0) -> int:
    """An architecture-specific number such as `block_count`; the maximum if it is a list."""
    value: Any = header.metadata.get(f"{architecture(header)}.{key}", default)
    if isinstance(value, list | tuple):
        return max((int(item) for item in cast("list[int]", value)), default=default)
    return int(value) if isinstance(value, int | float) else default


def is_embedding(header: WeightsHeader) -> bool:
    return f"{architecture(header)}.pooling_type" in header.metadata


def facts_of(stored: StoredModel, header: WeightsHeader) -> ModelFacts:
    """Facts of a stored model with that header."""
    layers = number(header, "block_count", 1)
    heads = number(header, "attention.head_count", 1)
    width = number(header, "embedding_length", 64)
    head_width = width // max(1, heads)
    input_bytes, output_bytes = _input_and_output_bytes(header)
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
        input_bytes=input_bytes,
        output_bytes=output_bytes,
        parameters=runner_parameters((name, json.dumps(value)) for name, value in stored.parameters.items()),
    )


def _input_and_output_bytes(header: WeightsHeader) -> tuple[int | None, int | None]:
    """Bytes that stay in host memory, and bytes of the output layer; None where the tensor table does not say."""
    sizes = {name: tensor_bytes(kind, shape) or 0 for name, kind, shape in header.tensors if "blk." not in name}
    if not sizes:
        return None, None
    embedding = sizes.get("token_embd.weight")
    output = sum(size for name, size in sizes.items() if name in _OUTPUT)
    is_encoder = any(name.startswith("token_embd_norm") for name in sizes)
    if "output.weight" in sizes or is_encoder:
        return embedding, output
    return 0, output + (embedding or 0)  # tied: the embedding table is the output layer


def _kv_heads(header: WeightsHeader, layers: int, heads: int) -> tuple[int, ...]:
    value: Any = header.metadata.get(f"{architecture(header)}.attention.head_count_kv", heads)
    if isinstance(value, list | tuple):
        return tuple(int(item) for item in cast("list[int]", value))
    return (int(value),) * layers
