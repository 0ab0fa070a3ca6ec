"""Facts of a model read from the header of its weights file, as an Ollama server computes them.

Used where no server runs: by `check-config`, and by the emulated server. A running server is asked instead
(`router/engines/ollama/model_metadata.py`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import msgspec

from router.domain.model import BlobDigest, ModelFacts
from router.domain.model_names import parse_name
from router.engines.ollama.blob_store import BlobStore, StoredModel
from router.engines.ollama.client import TagRow
from router.engines.ollama.gguf_header import read_header
from router.engines.ollama.gguf_show import show_reply
from router.engines.ollama.model_metadata import read_facts as facts_of_reply
from router.engines.ollama.runner_options import runner_parameters

TensorTable = tuple[tuple[str, str, tuple[int, ...]], ...]
"""Name, type and shape of each tensor."""


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
    """Facts of a stored model with that header, by the rules for the reply of `/api/show`."""
    modelfile = "FROM sha256:" + "0" * 64  # the blob's own digest, of any form, is set below
    reply = msgspec.structs.replace(show_reply(header.metadata, header.tensors), modelfile=modelfile)
    facts = facts_of_reply(TagRow(stored.name.shortest, stored.digest, stored.weights.size), reply)
    assert facts is not None
    return replace(
        facts,
        blob=BlobDigest(stored.weights.digest),
        parameters=runner_parameters((name, json.dumps(value)) for name, value in stored.parameters.items()),
    )
