"""Which architecture keeps which cache, and which program runs it: one table.

Sources: Ollama v0.24 `fs/ggml/ggml.go` (OllamaEngineRequired, FlashAttention), `model/models/*`, `kvcache/causal.go`;
llama.cpp `src/llama-model.cpp` (`set_swa_pattern`, `create_memory`); buffer sizes in the logs of real servers
(docs/footprints.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from router.domain.model import ModelFacts
from router.engines.ollama.server_version import LLAMA_SERVER_SINCE, ServerVersion


class Backend(StrEnum):
    """The program that holds the model inside an Ollama server."""

    LLAMA_CPP = "llama.cpp"
    """llama.cpp: linked into the server up to 0.24, a separate `llama-server` from 0.30."""
    OLLAMA_ENGINE = "ollama"
    """Ollama's own engine, up to 0.24."""


@dataclass(frozen=True, slots=True)
class CacheRules:
    """How an architecture's attention layers share the context between them."""

    full_attention_every: int = 1
    """Layer i attends to the whole context where (i + 1) is a multiple of this; the others slide. 1: all do."""
    sliding_since: ServerVersion = (0, 0, 0)
    """Older servers keep the whole context for sliding layers as well (llama.cpp backend only)."""
    window_tokens: int = 0
    """Window where the model's metadata names none."""
    engine_memory_tokens: int = 0
    """Tokens that Ollama's own engine keeps of a sliding layer where that is more than the window (NewSWAMemCache)."""
    is_encoder: bool = False
    """Sees its whole input at once: no KV cache."""


_SLIDING_LATER: ServerVersion = LLAMA_SERVER_SINCE

CACHE_RULES: Mapping[str, CacheRules] = {
    "gemma2": CacheRules(2, _SLIDING_LATER),
    "gemma3": CacheRules(6),
    "gemma3n": CacheRules(5),
    "gemma4": CacheRules(6, engine_memory_tokens=4096),
    "gptoss": CacheRules(2, engine_memory_tokens=4096),
    "gpt-oss": CacheRules(2, engine_memory_tokens=4096),
    "cohere2": CacheRules(4, _SLIDING_LATER),
    "llama4": CacheRules(4, _SLIDING_LATER, window_tokens=8192),
    "olmo3": CacheRules(4, _SLIDING_LATER),
    "exaone4": CacheRules(4, _SLIDING_LATER),
    "bert": CacheRules(is_encoder=True),
    "gemma-embedding": CacheRules(is_encoder=True),
    "jina-bert-v2": CacheRules(is_encoder=True),
    "jina-bert-v3": CacheRules(is_encoder=True),
    "modern-bert": CacheRules(is_encoder=True),
    "neo-bert": CacheRules(is_encoder=True),
    "nomic-bert": CacheRules(is_encoder=True),
    "nomic-bert-moe": CacheRules(is_encoder=True),
}
"""Architectures whose layers do not all keep the whole context."""

PLAIN_ATTENTION = frozenset(
    ("baichuan", "command-r", "deepseek", "deepseek2", "falcon", "gemma", "glm4", "glm4moe", "glm4moelite", "granite",
     "granitemoe", "internlm2", "llama", "mistral3", "minicpm", "mllama", "olmo", "olmo2", "phi2", "phi3", "phimoe",
     "qwen", "qwen2", "qwen2moe", "qwen2vl", "qwen25vl", "qwen3", "qwen3moe", "qwen3vl", "qwen3vlmoe", "smollm3",
     "stablelm", "starcoder", "starcoder2")
)  # fmt: skip
"""Architectures with one full-context cache for each layer."""

HYBRIDS = frozenset(("falcon-h1", "granitehybrid", "jamba", "lfm2", "lfm2moe", "nemotron_h", "nemotron_h_moe",
                     "nemotron_h_omni", "plamo2", "qwen35", "qwen35moe", "qwen3next"))  # fmt: skip
"""Architectures in which some layers keep a recurrent state instead of a cache."""

OLLAMA_ENGINE_ARCHITECTURES = frozenset(
    ("bert", "deepseek2", "deepseekocr", "gemma3", "gemma3n", "gemma4", "glm4moelite", "glmocr", "gpt-oss", "gptoss",
     "laguna", "lfm2", "lfm2moe", "llama4", "mistral3", "mllama", "nemotron_h", "nemotron_h_moe", "nemotron_h_omni",
     "nomic-bert", "olmo3", "qwen25vl", "qwen3", "qwen35", "qwen35moe", "qwen3moe", "qwen3next", "qwen3vl",
     "qwen3vlmoe")
)  # fmt: skip
"""What a server up to 0.24 runs on its own engine (OllamaEngineRequired, v0.24)."""

KNOWN_MARGIN_RATIO = 0.02
"""Safety margin of a load that was never measured, as a ratio of its estimate: of 33 loads of real servers the lowest
estimate was 1.6 % under (docs/footprints.md)."""
UNKNOWN_MARGIN_RATIO = 0.10
"""The same for an architecture that the table lacks."""

_NO_RULES = CacheRules()


def cache_rules(architecture: str) -> CacheRules:
    """The table's row; the general rule, a full cache in each layer, for an architecture that it lacks."""
    return CACHE_RULES.get(architecture, _NO_RULES)


def margin_ratio(facts: ModelFacts) -> float:
    """By how much more than its estimate a load that was never measured may take."""
    return KNOWN_MARGIN_RATIO if is_known(facts) else UNKNOWN_MARGIN_RATIO


def is_known(facts: ModelFacts) -> bool:
    """Whether the table has the architecture; a load of another one gets a wider margin."""
    kind = facts.architecture
    return kind in CACHE_RULES or kind in PLAIN_ATTENTION or kind in HYBRIDS


def backend_of(facts: ModelFacts, version: ServerVersion) -> Backend:
    """Which program a server of that version runs the model in."""
    if version < LLAMA_SERVER_SINCE and facts.architecture in OLLAMA_ENGINE_ARCHITECTURES:
        return Backend.OLLAMA_ENGINE
    return Backend.LLAMA_CPP
