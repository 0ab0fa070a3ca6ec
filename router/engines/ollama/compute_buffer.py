"""Working memory of a model's compute graph on each GPU, by backend and server version.

Notation: b batch, C context of one slot, E width, F feed-forward length, V vocabulary, H heads, d key length; elements
of 4 bytes. Fitted to the buffer sizes that real servers logged (docs/footprints.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from router.domain.model import ModelFacts
from router.engines.ollama.architectures import Backend, cache_rules
from router.engines.ollama.server_version import LLAMA_SERVER_SINCE, ServerVersion

MIB = 1024**2

OUTPUTS_BY_SLOT_SINCE: ServerVersion = (0, 31, 0)
"""From here logits are reserved for one token a slot, not for a whole batch."""

PIPELINE_COPIES = 4
"""Copies of the graph's inputs that llama.cpp keeps where layers are on several GPUs (GGML_SCHED_MAX_COPIES)."""

_ENGINE_OVERHEAD_BYTES = 20 * MIB
"""What Ollama's own engine reserves beyond the formula: 80 MiB for gemma3:1b where 61 are explained."""
_VISION_GRAPH_BYTES = 1434 * MIB
"""The image encoder's graph on Ollama's own engine: 1.1 to 1.4 GiB seen for gemma3:4b and qwen2.5vl:7b."""
_QWEN25VL_GRAPH_BYTES = 5939 * MIB
_QWEN25VL_GRAPH_SINCE: ServerVersion = (0, 13, 4)
"""From here 5.8 GiB for qwen2.5vl:7b."""
_NO_VISION_GRAPH = frozenset({"gemma4"})
"""No image encoder's graph was seen in what these reserve on Ollama's own engine."""
_CLIP_GRAPH_BYTES = 720 * MIB
"""The image encoder's graph in llama-server: 0.7 GiB seen for qwen2.5vl:3b."""
_LAST_GPU_UNEXPLAINED_BATCH_LOGITS = 9
"""gemma4 over several GPUs, seen once before 0.30: 4.5 GiB more on the last GPU than the formula gives, nine times the
logits of a batch; not explained, so kept as a safety there."""


@dataclass(frozen=True, slots=True)
class GraphShape:
    """What the size of a compute graph depends on, next to the model."""

    context_length: int
    slots: int
    flash_attention: bool
    batch: int
    backend: Backend
    version: ServerVersion
    gpus: int = 1
    """GPUs that hold layers of the model."""


def compute_buffer_bytes(facts: ModelFacts, shape: GraphShape) -> int:
    """Bytes on each GPU that holds layers, without the image encoder's graph and `unexplained_bytes`."""
    text = _text_graph_bytes(facts, shape)
    if shape.gpus > 1 and shape.backend is Backend.LLAMA_CPP:
        text += _pipeline_bytes(facts, shape)
    return text


def unexplained_bytes(facts: ModelFacts, shape: GraphShape) -> int:
    """Bytes more on the GPU of the output layer that were seen and are not explained."""
    is_llama_cpp = shape.backend is Backend.LLAMA_CPP and shape.version < LLAMA_SERVER_SINCE
    if facts.architecture in ("gemma3n", "gemma4") and shape.gpus > 1 and is_llama_cpp:
        return _LAST_GPU_UNEXPLAINED_BATCH_LOGITS * 4 * min(shape.batch, 512) * facts.vocabulary_size
    return 0


def vision_graph_bytes(facts: ModelFacts, shape: GraphShape) -> int:
    """The image encoder's graph, for models with vision."""
    if not facts.has_vision:
        return 0
    if shape.backend is Backend.LLAMA_CPP:
        return _CLIP_GRAPH_BYTES if shape.version >= LLAMA_SERVER_SINCE else 0
    if facts.architecture in _NO_VISION_GRAPH:
        return 0
    if facts.architecture == "qwen25vl" and shape.version >= _QWEN25VL_GRAPH_SINCE:
        return _QWEN25VL_GRAPH_BYTES
    return _VISION_GRAPH_BYTES


def _text_graph_bytes(facts: ModelFacts, shape: GraphShape) -> int:
    if shape.backend is Backend.OLLAMA_ENGINE:
        return _engine_graph_bytes(facts, shape)
    if shape.version >= OUTPUTS_BY_SLOT_SINCE:
        return _recent_graph_bytes(facts, shape)
    return _older_graph_bytes(facts, shape)


def _older_graph_bytes(facts: ModelFacts, shape: GraphShape) -> int:
    """llama.cpp before 0.31: logits of the whole batch, the mask over all slots' context.

    With flash attention max(4b 2F + 6bC', 4b(E + V)); without max(4b(1 + 2E + 2Hd + C'(1 + H)), 4b(E + V)), C' the
    tokens that the mask covers.
    """
    batch = min(shape.batch, shape.context_length * shape.slots)
    tokens = _mask_tokens(facts, shape)
    logits = 0 if cache_rules(facts.architecture).is_encoder else facts.embedding_length + facts.vocabulary_size
    if shape.flash_attention:
        return max(4 * batch * 2 * _feed_forward(facts) + 6 * batch * tokens, 4 * batch * logits)
    return max(_attention_bytes(facts, batch, tokens), 4 * batch * logits)


def _recent_graph_bytes(facts: ModelFacts, shape: GraphShape) -> int:
    """llama.cpp from 0.31: max(4b(3F + 4E) + 2bC, 4 slots V) with flash attention (exact for qwen3:4b: 85 MiB)."""
    batch = min(shape.batch, shape.context_length * shape.slots)
    tokens = _mask_tokens(facts, shape)
    outputs = 0 if cache_rules(facts.architecture).is_encoder else 4 * shape.slots * facts.vocabulary_size
    if shape.flash_attention:
        width = 3 * _feed_forward(facts) + 4 * facts.embedding_length
        return max(4 * batch * width + 2 * batch * tokens, outputs)
    return max(_attention_bytes(facts, batch, tokens), outputs)


def _engine_graph_bytes(facts: ModelFacts, shape: GraphShape) -> int:
    """Ollama's own engine, which reserves logits for its slots only; gpt-oss by Ollama's own figure (GraphSize).

    Without flash attention the keys and values of layers that see the whole context are copied as 32-bit numbers.
    """
    if facts.architecture in ("gptoss", "gpt-oss") and shape.flash_attention:
        tokens = shape.context_length * shape.slots
        return (4 * shape.slots + (tokens >> 10) + 110) * MIB
    is_encoder = cache_rules(facts.architecture).is_encoder
    tokens = shape.batch if is_encoder else shape.context_length * shape.slots
    batch = min(shape.batch, tokens)
    outputs = 0 if is_encoder else 4 * shape.slots * facts.vocabulary_size
    experts = 2 * facts.expert_used_count * facts.embedding_length
    if shape.flash_attention:
        width = 3 * _feed_forward(facts) + 4 * facts.embedding_length + experts
        return max(4 * batch * width + 6 * batch * tokens, outputs) + _ENGINE_OVERHEAD_BYTES
    scores = _attention_bytes(facts, batch, tokens)
    copies = (
        0 if is_encoder else 4 * tokens * min(facts.head_count_kv or (0,)) * (facts.key_length + facts.value_length)
    )
    return max(scores + copies, outputs)


def _pipeline_bytes(facts: ModelFacts, shape: GraphShape) -> int:
    """Three more copies of mask and input: 3(4bC + 4bE), or 3 x 2bC with the 16-bit mask of newer builds."""
    batch, tokens = shape.batch, _mask_tokens(facts, shape)
    if shape.version >= OUTPUTS_BY_SLOT_SINCE and shape.flash_attention:
        return (PIPELINE_COPIES - 1) * 2 * batch * tokens
    return (PIPELINE_COPIES - 1) * 4 * batch * (tokens + facts.embedding_length)


def _mask_tokens(facts: ModelFacts, shape: GraphShape) -> int:
    """Tokens that the attention mask covers: one slot's context from 0.30, where streams are separate, else all."""
    if cache_rules(facts.architecture).is_encoder:
        return min(shape.batch, shape.context_length * shape.slots)
    separate = shape.version >= LLAMA_SERVER_SINCE
    return shape.context_length * (1 if separate else shape.slots)


def _attention_bytes(facts: ModelFacts, batch: int, tokens: int) -> int:
    """Attention without flash attention: a batch's activations, and its scores against `tokens` of context."""
    return 4 * batch * (1 + _attention_width(facts) + tokens * (1 + facts.head_count))


def _attention_width(facts: ModelFacts) -> int:
    """Activations of one token in attention: 2E and the queries twice, which are wider than E in some models."""
    return 2 * facts.embedding_length + 2 * max(facts.embedding_length, facts.head_count * facts.key_length)


def _feed_forward(facts: ModelFacts) -> int:
    return facts.feed_forward_length or 4 * facts.embedding_length
