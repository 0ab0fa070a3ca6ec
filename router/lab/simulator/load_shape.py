"""In what shape a server of some version loads a model: its slots, its flash attention, its cache's type, its batch.

Simulated and emulated servers both ask here, so that they cannot differ. Up to 0.24 the model decides whether it has
flash attention, and without that its cache is f16; from 0.30 both are passed to llama-server as they were asked for.
What a batch comes to where memory is short is `router.lab.simulator.server_placement`'s to say. Pure, and no GPU is
known here.

Sources: Ollama v0.24, `llm/server.go`, `fs/ggml/ggml.go`, `server/sched.go`; v0.33, `server/sched.go`,
`llm/llama_server.go`.
"""

from __future__ import annotations

from dataclasses import dataclass

from router.domain.model import ModelFacts
from router.engines.ollama.memory_estimate import batch_tokens, effective_kv_cache_type, uses_flash_attention
from router.engines.ollama.offload_rules import OLLAMA_ENGINE_ARCHITECTURES
from router.lab.simulator.world import LoadShape, kv_layer_bytes

ONE_SLOT = frozenset(
    ("mllama", "qwen3vl", "qwen3vlmoe", "qwen35", "qwen35moe", "qwen3next", "lfm2", "lfm2moe", "nemotron_h")
)
"""Families that a real server gives one slot, whatever is asked (server/sched.go, v0.24)."""
_KEPT_PROMPT_BYTES = 8 * 1024**3


@dataclass(frozen=True, slots=True)
class RequestedShape:
    """What a server is set to, and the batch that a request names."""

    version: tuple[int, ...]
    context_length: int
    slots: int
    kv_cache_type: str
    flash_attention: bool | None
    """None: left to the server."""
    batch_tokens: int | None = None
    """None: left to the server."""


def shape_for(model: ModelFacts, asked: RequestedShape) -> LoadShape:
    """With the batch that the server takes where memory is no matter."""
    slots = 1 if model.is_embedding or model.architecture in ONE_SLOT else asked.slots
    context = min(asked.context_length, model.context_length or asked.context_length)
    version = ".".join(map(str, asked.version))
    given = asked.batch_tokens
    has_flash = uses_flash_attention(model, asked.flash_attention, version)
    return LoadShape(
        context_length=context,
        slots=slots,
        kv_cache_type=_cache_type(model, asked, version, has_flash=has_flash),
        flash_attention=has_flash,
        batch_tokens=batch_tokens(version, context, slots) if given is None else max(1, given),
    )


def kept_tokens(model: ModelFacts, shape: LoadShape, version: tuple[int, ...]) -> int:
    """How many tokens of evicted prompts a runner keeps in host memory: 8 GiB of their cache, from 0.30 (llama-server's
    `--cache-ram`)."""
    if version < (0, 30):
        return 0
    token = kv_layer_bytes(model, shape) * model.layers // max(1, shape.context_length * shape.slots)
    return _KEPT_PROMPT_BYTES // max(1, token)


def _cache_type(model: ModelFacts, asked: RequestedShape, version: str, *, has_flash: bool) -> str:
    """Ollama's own engine, and from 0.30 llama-server, takes a quantised type wherever it uses flash attention,
    llama.cpp's before that only where it was asked for."""
    is_taken = has_flash and (model.architecture in OLLAMA_ENGINE_ARCHITECTURES or asked.version >= (0, 30))
    return effective_kv_cache_type(model, asked.kv_cache_type, is_taken or asked.flash_attention, version)
