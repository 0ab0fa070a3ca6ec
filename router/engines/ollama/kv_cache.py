"""Bytes of the KV cache, of recurrent state and of the draft context, layer by layer.

Held to the cache sizes that real servers logged (docs/footprints.md): exact to 1 % for all architectures in the table
of `engines/ollama/architectures.py`.
"""

from __future__ import annotations

from functools import lru_cache

from router.domain.model import ModelFacts
from router.engines.ollama.architectures import Backend, CacheRules, cache_rules
from router.engines.ollama.ggml_types import cache_bytes
from router.engines.ollama.server_version import ServerVersion

CELL_PADDING = 256
"""Caches are rounded up to so many cells (llama.cpp `n_pad`, Ollama's `CachePadding` with flash attention)."""

DRAFT_SINCE: ServerVersion = (0, 31, 0)
DRAFT_BUFFER_BYTES = 130 * 1024**2
"""What a draft context takes beside its cache: 582 MiB in all were seen on a 27B model at 110k tokens."""

_FLOAT_BYTES = 4


@lru_cache(maxsize=4096)
def layer_cache_bytes(
    facts: ModelFacts,
    context_length: int,
    slots: int,
    kv_cache_type: str,
    batch: int,
    backend: Backend,
    version: ServerVersion,
) -> tuple[int, ...]:
    """KV cache and recurrent state of each layer.

    A layer with attention keeps KV heads x (key length + value length) elements of `kv_cache_type` a cell. Cells: the
    context of all slots, or for sliding layers what `sliding_cells` says. Encoders keep none.

    `context_length`: tokens of one slot.

    Raises:
        ValueError: an unknown `kv_cache_type`.
    """
    rules = cache_rules(facts.architecture)
    if rules.is_encoder:
        return (0,) * facts.layers
    full = _padded(context_length) * slots
    window = sliding_cells(facts, rules, context_length, slots, batch, backend)
    slides = _sliding_layers(facts, rules, backend, version)
    owners = facts.layers - facts.shared_kv_layers
    sizes: list[int] = []
    for layer in range(facts.layers):
        if layer >= owners:
            sizes.append(0)
        elif not _has_attention(facts, layer):
            sizes.append(facts.recurrent_state_elements * _FLOAT_BYTES * slots)
        elif slides[layer]:
            sizes.append(min(full, window) * _cell_bytes(facts, layer, kv_cache_type, sliding=True))
        else:
            sizes.append(full * _cell_bytes(facts, layer, kv_cache_type, sliding=False))
    return tuple(sizes)


def layer_state_bytes(facts: ModelFacts, slots: int) -> tuple[int, ...]:
    """The part of `layer_cache_bytes` that is recurrent state: of layers without attention, in 32-bit numbers."""
    if cache_rules(facts.architecture).is_encoder:
        return (0,) * facts.layers
    size = facts.recurrent_state_elements * _FLOAT_BYTES * slots
    return tuple(0 if _has_attention(facts, layer) else size for layer in range(facts.layers))


def draft_context_bytes(facts: ModelFacts, context_length: int, slots: int, version: ServerVersion) -> int:
    """The second context that a model with draft layers (`nextn`) gets from 0.31: an f16 cache and its buffers."""
    if not facts.nextn_layers or version < DRAFT_SINCE:
        return 0
    heads = max(facts.head_count_kv, default=facts.head_count)
    cell = heads * (facts.key_length + facts.value_length) * 2
    return facts.nextn_layers * cell * _padded(context_length) * slots + DRAFT_BUFFER_BYTES


def sliding_cells(
    facts: ModelFacts, rules: CacheRules, context_length: int, slots: int, batch: int, backend: Backend
) -> int:
    """Cells of a sliding layer for all slots.

    llama.cpp keeps the window and one batch for each slot. Ollama's own engine keeps its memory, the window or more,
    for each slot and one batch for all (`kvcache/causal.go`, Init).
    """
    window = facts.sliding_window or rules.window_tokens
    if backend is Backend.OLLAMA_ENGINE:
        return _padded(slots * max(window, rules.engine_memory_tokens) + batch)
    return _padded(min(context_length, window + batch)) * slots


def _sliding_layers(facts: ModelFacts, rules: CacheRules, backend: Backend, version: ServerVersion) -> tuple[bool, ...]:
    has_window = bool(facts.sliding_window or rules.window_tokens)
    too_old = backend is Backend.LLAMA_CPP and version < rules.sliding_since
    if not has_window or too_old:
        return (False,) * facts.layers
    if len(facts.sliding_layers) == facts.layers:
        return facts.sliding_layers
    every = rules.full_attention_every
    return tuple((layer + 1) % every != 0 for layer in range(facts.layers))


def _has_attention(facts: ModelFacts, layer: int) -> bool:
    interval = facts.full_attention_interval
    if interval and (layer + 1) % interval:
        return False
    return _kv_heads(facts, layer) > 0


def _kv_heads(facts: ModelFacts, layer: int) -> int:
    return facts.head_count_kv[layer] if layer < len(facts.head_count_kv) else facts.head_count


def _cell_bytes(facts: ModelFacts, layer: int, kv_cache_type: str, *, sliding: bool) -> int:
    heads = _kv_heads(facts, layer)
    key = (facts.key_length_swa if sliding else None) or facts.key_length
    value = (facts.value_length_swa if sliding else None) or facts.value_length
    return cache_bytes(kv_cache_type, heads * key) + cache_bytes(kv_cache_type, heads * value)


def _padded(tokens: int) -> int:
    return -(-tokens // CELL_PADDING) * CELL_PADDING
