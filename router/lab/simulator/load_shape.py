"""The shape in which each server version loads a model: slots, flash attention, KV cache type and batch size.

Shared by the simulated and the emulated servers. Up to 0.24 the model decides whether flash attention is used, and
without it the cache is f16; from 0.30 both settings are passed to llama-server as requested. How the batch shrinks when
memory is short is in `router.lab.simulator.server_placement`. Pure.

Sources: Ollama v0.24, `llm/server.go`, `fs/ggml/ggml.go`, `server/sched.go`; v0.33, `server/sched.go`,
`llm/llama_server.go`.
"""

from __future__ import annotations

from dataclasses import dataclass

from router.domain.model import ModelFacts
from router.engines.ollama.memory_estimate import batch_tokens, effective_kv_cache_type, uses_flash_attention
from router.engines.ollama.offload_rules import OLLAMA_ENGINE_ARCHITECTURES
from router.lab.simulator.true_footprint import LoadShape, cache_bytes_of

ONE_SLOT = frozenset(
    ("mllama", "qwen3vl", "qwen3vlmoe", "qwen35", "qwen35moe", "qwen3next", "lfm2", "lfm2moe", "nemotron_h")
)
"""Architectures that always get one slot (server/sched.go, v0.24)."""
_KEPT_PROMPT_BYTES = 8 * 1024**3


@dataclass(frozen=True, slots=True)
class RequestedShape:
    """A server's settings and the batch size of a request."""

    version: tuple[int, ...]
    context_length: int
    slots: int
    kv_cache_type: str
    flash_attention: bool | None
    """None: the server's default."""
    batch_tokens: int | None = None
    """None: the server's default."""


def shape_for(model: ModelFacts, requested: RequestedShape) -> LoadShape:
    """The load shape, with the batch size used when memory is not short."""
    slots = 1 if model.is_embedding or model.architecture in ONE_SLOT else requested.slots
    context = min(requested.context_length, model.context_length or requested.context_length)
    version = ".".join(map(str, requested.version))
    requested_batch = requested.batch_tokens
    flash_attention_used = uses_flash_attention(model, requested.flash_attention, version)
    return LoadShape(
        context_length=context,
        slots=slots,
        kv_cache_type=_cache_type(model, requested, version, flash_attention_used=flash_attention_used),
        flash_attention=flash_attention_used,
        batch_tokens=batch_tokens(model, context, slots, version)
        if requested_batch is None
        else max(1, requested_batch),
        version=requested.version,
        own_engine=requested.version < (0, 30) and model.architecture in OLLAMA_ENGINE_ARCHITECTURES,
    )


def kept_tokens(model: ModelFacts, shape: LoadShape, version: tuple[int, ...]) -> int:
    """Tokens of evicted prompts kept in host memory: 8 GiB of them from 0.30 (llama-server's `--cache-ram`), else 0."""
    if version < (0, 30):
        return 0
    bytes_per_token = cache_bytes_of(model, shape) // max(1, shape.context_length * shape.slots)
    return _KEPT_PROMPT_BYTES // max(1, bytes_per_token)


def _cache_type(model: ModelFacts, requested: RequestedShape, version: str, *, flash_attention_used: bool) -> str:
    """Ollama's own engine, and from 0.30 llama-server, uses a quantised cache whenever flash attention is on; the older
    llama.cpp engine only when flash attention was requested explicitly."""
    is_quantised_allowed = flash_attention_used and (
        model.architecture in OLLAMA_ENGINE_ARCHITECTURES or requested.version >= (0, 30)
    )
    return effective_kv_cache_type(
        model, requested.kv_cache_type, is_quantised_allowed or requested.flash_attention, version
    )
