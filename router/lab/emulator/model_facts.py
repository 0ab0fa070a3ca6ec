"""Speed and capabilities of a model in the EMULATED store, derived from its weights header. Pure."""

from __future__ import annotations

import math

from router.engines.ollama.blob_store import StoredModel
from router.engines.ollama.ggml_types import tensor_bytes
from router.engines.ollama.gguf_facts import WeightsHeader, is_embedding, number


def active_share(header: WeightsHeader) -> float:
    """Share of the weights used per token: below 1 for mixture-of-experts models."""
    expert_count, used_count = number(header, "expert_count"), number(header, "expert_used_count")
    if not expert_count or not used_count:
        return 1.0
    sizes = {name: tensor_bytes(kind, shape) or math.prod(shape) for name, kind, shape in header.tensors}
    experts = sum(size for name, size in sizes.items() if "_exps." in name)
    return 1.0 - experts / max(1, sum(sizes.values())) * (1.0 - used_count / expert_count)


def capabilities(stored: StoredModel, header: WeightsHeader) -> tuple[str, ...]:
    """Capabilities in the order of `/api/show`."""
    if is_embedding(header):
        return ("embedding",)
    names = ["completion"]
    names += ["vision"] if number(header, "vision.block_count") else []
    names += ["tools"] if ".Tools" in stored.template else []
    names += ["insert"] if ".Suffix" in stored.template else []
    names += ["thinking"] if ".Think" in stored.template else []
    return tuple(names)
