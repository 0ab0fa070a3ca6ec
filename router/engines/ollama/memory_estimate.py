"""What a model takes on each GPU: weights, KV cache, compute buffer and CUDA context, from its facts alone.

Each part is a function of its own that names its source. The figures are of a load with all layers on the GPUs, which
is the only load the router asks for. Where a fact is missing, the larger answer is given. Left out is what the facts do
not tell: the working memory of vision encoders and the small state of recurrent layers.

It reads no GPU and reserves nothing.

Sources: Ollama v0.11.4 to v0.24, `fs/ggml/ggml.go` (GraphSize, FlashAttention, SupportsFlashAttention),
`ml/backend/ggml/ggml.go` (which tensor goes where), `discover/gpu.go`; llama.cpp, `src/llama-model.cpp` (layer split),
`src/llama-kv-cache*.cpp` (cache), `src/llama-graph.cpp` (mask).
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

from router.domain.footprint import Footprint
from router.domain.model import ModelFacts
from router.engines.ollama.ggml_types import cache_bytes

MIB = 1024**2

CUDA_CONTEXT_BYTES = 457 * MIB
"""A process's CUDA context on one GPU, cuBLAS and kernels included: `cudaMinimumMemory` (discover/gpu.go, v0.11.4),
which Ollama keeps free of every GPU for it, in v0.24 too."""

DEFAULT_BATCH_TOKENS = 512
"""Ollama's `num_batch` (api/types.go) up to v0.24; llama.cpp's micro-batch."""

_ENCODERS = frozenset(
    {
        "bert",
        "gemma-embedding",
        "jina-bert-v2",
        "jina-bert-v3",
        "modern-bert",
        "neo-bert",
        "nomic-bert",
        "nomic-bert-moe",
    }
)
"""Architectures that see their whole input at once: llama.cpp makes no KV cache for them (`create_memory`)."""

_FULL_ATTENTION_EVERY: Mapping[str, int] = {"gemma3": 6, "gemma3n": 5, "gptoss": 2, "gpt-oss": 2}
"""Layer i keeps no more than its sliding window unless i + 1 is a multiple of this (GraphSize; llama.cpp's pattern).
Other architectures with windows (gemma2, cohere2) count with the whole context, which older servers keep."""

_WINDOW_TOKENS_LEAST: Mapping[str, int] = {"gptoss": 4096, "gpt-oss": 4096}
"""What Ollama's own engine keeps of a sliding layer where that is more than the window (GraphSize, gptoss)."""

_FLASH_ONLY_IF_ASKED = frozenset({"deepseek2", "gemma3n", "gemma4", "llama4", "mllama", "qwen25vl"})
"""Architectures of Ollama's own engine that its FlashAttention list lacks."""

_NEVER_FLASH = frozenset({"gemma2"})
_FLASH_UNASKED, _FLASH_AS_ASKED = (0, 12), (0, 30)
"""Before the one, flash attention was used only where it was asked for; from the other it is, whatever the model."""
_FLASH_WITH_UNEQUAL_HEADS = frozenset({"qwen35", "qwen35moe", "qwen3next"})


@dataclass(frozen=True, slots=True)
class LayerSplit:
    """Whole layers of each GPU, in GPU order and in layer order, and the GPU that holds the output layer."""

    layers: tuple[int, ...]
    output_gpu: int


def footprint(
    facts: ModelFacts,
    gpus: int,
    context_length: int,
    slots: int,
    kv_cache_type: str,
    flash_attention: bool | None,
    batch: int = DEFAULT_BATCH_TOKENS,
    version: str | None = None,
) -> Footprint:
    """Bytes on each of `gpus` GPUs with all layers spread evenly over them.

    `context_length`: tokens of one slot, already cut to the trained context. `kv_cache_type`: f16, q8_0 or q4_0; ""
    is f16. `flash_attention`: None is the server's own choice. `version`: the server's; one that is not known counts as
    0.24. The parts are sums over the GPUs. With no GPUs `per_gpu_bytes` is empty, and the parts say what host memory
    a load takes.

    Raises:
        ValueError: an unknown `kv_cache_type`, or a number out of range; the text names it.
    """
    split = even_split(facts.layers, gpus)
    return footprint_of_split(facts, split, context_length, slots, kv_cache_type, flash_attention, batch, version)


@lru_cache(maxsize=4096)
def footprint_of_split(
    facts: ModelFacts,
    split: LayerSplit,
    context_length: int,
    slots: int,
    kv_cache_type: str,
    flash_attention: bool | None,
    batch: int = DEFAULT_BATCH_TOKENS,
    version: str | None = None,
) -> Footprint:
    """Bytes on each GPU with the layers put as `split` says; a GPU that holds none takes nothing.

    Everything else as in `footprint`.
    """
    plan = _plan(facts, context_length, slots, kv_cache_type, flash_attention, batch, version)
    if not split.layers:
        return Footprint((), facts.weights_bytes, sum(plan.layer_cache_bytes), plan.compute_buffer_bytes, 0)
    weights: list[int] = []
    caches: list[int] = []
    used: list[bool] = []
    start = 0
    for gpu, count in enumerate(split.layers):
        has_output = gpu == split.output_gpu
        stop = start + count
        weights.append(sum(plan.layer_weights_bytes[start:stop]) + has_output * plan.output_bytes)
        caches.append(sum(plan.layer_cache_bytes[start:stop]))
        used.append(has_output or count > 0)
        start = stop
    fixed = [is_used * plan.fixed_bytes for is_used in used]
    return Footprint(
        per_gpu_bytes=tuple(sum(parts) for parts in zip(weights, caches, fixed, strict=True)),
        weights_bytes=sum(weights),
        kv_cache_bytes=sum(caches),
        compute_buffer_bytes=sum(used) * plan.compute_buffer_bytes,
        cuda_context_bytes=sum(used) * CUDA_CONTEXT_BYTES,
    )


def even_split(layers: int, gpus: int) -> LayerSplit:
    """Layers over equal GPUs: as `split_by` with equal shares.

    Raises:
        ValueError: a negative number.
    """
    if gpus < 0:
        raise ValueError(f"GPUs must not be negative: {gpus}")
    return split_by(layers, (1.0,) * gpus)


@lru_cache(maxsize=4096)
def split_by(layers: int, shares: tuple[float, ...]) -> LayerSplit:
    """Layers over GPUs in these shares, as llama.cpp puts them: of `layers` + 1 units, the last of them the output,
    unit i goes to the first GPU up to which the shares are more than i / (layers + 1) of all (`load_tensors`,
    `get_layer_buft_list`).

    Raises:
        ValueError: a negative number, or shares that are all nothing.
    """
    whole, units = sum(shares), layers + 1
    if layers < 0 or any(share < 0 for share in shares) or (shares and not whole):
        raise ValueError(f"no layers and shares to split by: {layers}, {shares}")
    bounds = [upto * units for upto in accumulate(shares)]
    gpus = [bisect_right(bounds, unit * whole) for unit in range(units if shares else 0)]
    counts = Counter(gpus[:-1])
    return LayerSplit(tuple(counts[gpu] for gpu in range(len(shares))), gpus[-1] if gpus else 0)


def fill_first_split(
    facts: ModelFacts,
    free_bytes: Sequence[int],
    context_length: int,
    slots: int,
    kv_cache_type: str,
    flash_attention: bool | None,
    batch: int = DEFAULT_BATCH_TOKENS,
    version: str | None = None,
) -> LayerSplit | None:
    """Layers over unequal GPUs in the order given: each is filled with whole layers before the next is begun, and the
    output layer goes to the last GPU with layers or, where it has no room for it, to a later one.

    `free_bytes`: what each GPU may be given. None where not all layers and the output fit. Errors as `footprint`.
    """
    plan = _plan(facts, context_length, slots, kv_cache_type, flash_attention, batch, version)
    counts = [0] * len(free_bytes)
    left = [free - plan.fixed_bytes for free in free_bytes]
    gpu = 0
    for size in plan.layer_bytes:
        while gpu < len(left) and left[gpu] < size:
            gpu += 1
        if gpu == len(left):
            return None
        left[gpu] -= size
        counts[gpu] += 1
    output_gpu = next((k for k in range(gpu, len(left)) if left[k] >= plan.output_bytes), None)
    return None if output_gpu is None else LayerSplit(tuple(counts), output_gpu)


# --- the parts --------------------------------------------------------------------------------------------------


def weights_on_gpus_bytes(facts: ModelFacts) -> int:
    """Weights less the input embedding table, which llama.cpp and Ollama's own engine keep in host memory
    (`LLM_TENSOR_LAYER_INPUT`; `input.bts`). A model without an output layer of its own has the table on the GPUs a
    second time; its facts give 0 for `input_bytes`."""
    return max(0, facts.weights_bytes - (facts.input_bytes or 0))


def output_on_gpus_bytes(facts: ModelFacts) -> int:
    """The output layer, which goes to one GPU whole; 0 where its size is unknown (it then counts with the layers).
    Where the layers are unknown, nothing can be split, and all weights count as this."""
    weights = weights_on_gpus_bytes(facts)
    return weights if facts.layers == 0 else min(weights, facts.output_bytes or 0)


def layer_weights_bytes(facts: ModelFacts) -> tuple[int, ...]:
    """Weights of each layer: what is not input or output, in equal parts that sum up exactly."""
    weights, layers = weights_on_gpus_bytes(facts) - output_on_gpus_bytes(facts), facts.layers
    return tuple(weights * (layer + 1) // layers - weights * layer // layers for layer in range(layers))


def kv_cache_bytes(
    facts: ModelFacts, context_length: int, slots: int, kv_cache_type: str, batch: int = DEFAULT_BATCH_TOKENS
) -> int:
    """The whole KV cache: the sum of `layer_kv_cache_bytes`."""
    return sum(layer_kv_cache_bytes(facts, context_length, slots, kv_cache_type, batch))


def layer_kv_cache_bytes(
    facts: ModelFacts, context_length: int, slots: int, kv_cache_type: str, batch: int = DEFAULT_BATCH_TOKENS
) -> tuple[int, ...]:
    """KV cache of each layer: KV heads x (key length + value length) x context x slots x bytes an element, the bytes
    being 2 for f16, 34/32 for q8_0 and 18/32 for q4_0 (ggml's blocks). Layers without attention have no KV heads.

    A layer with a sliding window keeps the window and one batch of each slot (GraphSize, gemma3). Encoders keep none.
    """
    if facts.architecture in _ENCODERS:
        return (0,) * facts.layers
    every = _FULL_ATTENTION_EVERY.get(facts.architecture, 1) if facts.sliding_window else 1
    window = max(facts.sliding_window or 0, _WINDOW_TOKENS_LEAST.get(facts.architecture, 0)) + batch
    sizes: list[int] = []
    for layer in range(facts.layers):
        heads = facts.head_count_kv[layer] if layer < len(facts.head_count_kv) else facts.head_count
        tokens = context_length if (layer + 1) % every == 0 else min(context_length, window)
        key = cache_bytes(kv_cache_type, heads * facts.key_length)
        sizes.append((key + cache_bytes(kv_cache_type, heads * facts.value_length)) * tokens * slots)
    return tuple(sizes)


def compute_buffer_bytes(
    facts: ModelFacts, context_length: int, slots: int, flash_attention: bool, batch: int = DEFAULT_BATCH_TOKENS
) -> int:
    """The graph's working memory on one GPU, for a batch of B tokens, width E, H heads, V vocabulary, C = context x
    slots, in 4-byte elements.

    With flash attention the larger of the logits, B (E + V), and of one layer's activations with the attention mask,
    B (1 + 4E) + 1.5 B C (llama-graph.cpp: the mask as 32-bit and as 16-bit numbers); gptoss by GraphSize. Without, the
    scores of all heads come in: GraphSize, `fullOffload` of the architecture, llama's where it has none.
    """
    b, e, v, c = min(batch, context_length), facts.embedding_length, facts.vocabulary_size, context_length * slots
    h = facts.head_count
    logits = 0 if facts.architecture in _ENCODERS else 4 * b * (e + v)
    if flash_attention and facts.architecture in ("gptoss", "gpt-oss"):
        return max(logits, (4 * slots + (c >> 10) + 110) * MIB)
    if flash_attention:
        return max(logits, 4 * b * (1 + 4 * e) + 6 * b * c)
    if facts.architecture in ("gemma", "gemma2", "gemma3", "gemma3n"):
        graph = max(logits, 4 * b * (2 + c + c * h + 2 * e + 2 * facts.key_length * h))
        return 4 * graph if facts.architecture == "gemma3n" else graph
    width = 2 * e if facts.architecture == "qwen2" else 4 * e
    return max(logits, 4 * b * (1 + width + c * (1 + h)))


def uses_flash_attention(facts: ModelFacts, asked: bool | None, version: str | None = None) -> bool:
    """Whether a load uses flash attention. `asked`: None leaves it to the server, which on GPUs of compute capability
    7.0 and later chooses it for most architectures (FlashAttention; "auto" in llama.cpp's engine), before v0.12 for
    none.

    Never for embedding models. Up to v0.24 neither for gemma2, nor where key and value lengths differ
    (SupportsFlashAttention); later the wish is passed on to llama-server (llm/llama_server.go, v0.33).
    """
    number = version_number(version) or (0, 24)
    if asked is False or facts.is_embedding or (asked is None and number < _FLASH_UNASKED):
        return False
    if number >= _FLASH_AS_ASKED:
        return True
    if facts.architecture in _NEVER_FLASH:
        return False
    if facts.key_length != facts.value_length and facts.architecture not in _FLASH_WITH_UNEQUAL_HEADS:
        return False
    return asked is True or facts.architecture not in _FLASH_ONLY_IF_ASKED


def effective_kv_cache_type(
    facts: ModelFacts, kv_cache_type: str, flash_attention: bool | None, version: str | None = None
) -> str:
    """The type that a server really uses: a quantised cache needs flash attention, asked for in so many words
    (llm/server.go, v0.24: else it is ignored with a warning); f16 otherwise, which is never less."""
    quantised_ok = flash_attention is True and uses_flash_attention(facts, True, version)
    return kv_cache_type if quantised_ok else "f16"


@lru_cache(maxsize=64)
def version_number(version: str | None) -> tuple[int, int] | None:
    """Of a server, as far as rules differ by it: (0, 33) for 0.33.0-rc2; None where it cannot be told."""
    match = re.match(r"(\d+)\.(\d+)", version or "")
    return (int(match[1]), int(match[2])) if match is not None else None


def batch_tokens(version: str | None, context_length: int, slots: int) -> int:
    """`num_batch` where nothing sets it: 512 up to v0.24; from v0.30 by the tokens of all slots, 512 up to 4,096, 1,024
    up to 32,768, else 2,048 (llm/server.go, v0.33). An unknown version counts as an old one."""
    number = version_number(version)
    if number is None or number < (0, 30):
        return DEFAULT_BATCH_TOKENS
    tokens = context_length * slots
    return 512 if tokens <= 4096 else 1024 if tokens <= 32768 else 2048


# --- putting them together --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Plan:
    """The pieces that are put on GPUs: one figure for each layer, one for the output, one for each GPU in use."""

    layer_weights_bytes: tuple[int, ...]
    layer_cache_bytes: tuple[int, ...]
    output_bytes: int
    compute_buffer_bytes: int

    @property
    def layer_bytes(self) -> tuple[int, ...]:
        return tuple(w + c for w, c in zip(self.layer_weights_bytes, self.layer_cache_bytes, strict=True))

    @property
    def fixed_bytes(self) -> int:
        return self.compute_buffer_bytes + CUDA_CONTEXT_BYTES


def _plan(
    facts: ModelFacts,
    context_length: int,
    slots: int,
    kv_cache_type: str,
    flash_attention: bool | None,
    batch: int,
    version: str | None,
) -> _Plan:
    for name, value in (("context_length", context_length), ("slots", slots), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{name}: {value} must be at least 1")
    cache_bytes(kv_cache_type, 0)  # an unknown type is an error even where f16 would be used instead of it
    flash = uses_flash_attention(facts, flash_attention, version)
    cache_type = effective_kv_cache_type(facts, kv_cache_type, flash_attention, version)
    return _Plan(
        layer_weights_bytes=layer_weights_bytes(facts),
        layer_cache_bytes=layer_kv_cache_bytes(facts, context_length, slots, cache_type, batch),
        output_bytes=output_on_gpus_bytes(facts),
        compute_buffer_bytes=compute_buffer_bytes(facts, context_length, slots, flash, batch),
    )
