"""What a model takes on each GPU: weights, cache, working memory and CUDA context, from its facts alone.

Figures are of a load with all layers on the GPUs, which is the only load the router asks for. Where a fact is missing,
the larger answer is given. It reads no GPU and reserves nothing. How far it can be trusted: docs/footprints.md.

Sources: Ollama v0.11.4 to v0.34, `fs/ggml/ggml.go` (FlashAttention, SupportsFlashAttention), `ml/backend/ggml/ggml.go`
(which tensor goes where), `llm/llama_server.go`, `server/sched.go` (batch), `discover/gpu.go`; llama.cpp
`src/llama-model.cpp` (layer split). Cache and working memory: `engines/ollama/kv_cache.py`, `compute_buffer.py`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate

from router.domain.footprint import Footprint, GpuFootprint
from router.domain.gpu import Gpu
from router.domain.model import ModelFacts
from router.engines.ollama.architectures import Backend, backend_of
from router.engines.ollama.compute_buffer import (
    MIB,
    GraphShape,
    compute_buffer_bytes,
    unexplained_bytes,
    vision_graph_bytes,
)
from router.engines.ollama.ggml_types import cache_bytes
from router.engines.ollama.kv_cache import draft_context_bytes, layer_cache_bytes, layer_state_bytes
from router.engines.ollama.server_version import LLAMA_SERVER_SINCE, ServerVersion, version_or_default

CUDA_CONTEXT_BYTES = 457 * MIB
"""A process's CUDA context on one GPU, cuBLAS and kernels included: `cudaMinimumMemory` (discover/gpu.go, v0.11.4),
which Ollama keeps free of every GPU for it. Seen: 297 MiB on an A40, 451 to 456 on a 4090."""
BLACKWELL_CONTEXT_BYTES = 740 * MIB
"""The same on GPUs of compute capability 12: 708 to 753 MiB were seen on a Blackwell workstation."""
_BLACKWELL = (12, 0)

DEFAULT_BATCH_TOKENS = 512
"""Ollama's `num_batch` (api/types.go) up to v0.24; llama.cpp's micro-batch."""

_FLASH_ONLY_IF_ASKED = frozenset({"deepseek2", "gemma3n", "llama4", "mllama", "qwen25vl"})
"""Architectures of Ollama's own engine that its FlashAttention list lacks."""
_GEMMA4_FLASH_SINCE: ServerVersion = (0, 20, 4)
_NEVER_FLASH = frozenset({"gemma2"})
_FLASH_BY_DEFAULT_SINCE: ServerVersion = (0, 12, 0)
"""Older servers use flash attention only where it is asked for."""
_FLASH_WITH_UNEQUAL_HEADS = frozenset({"gemma4", "qwen35", "qwen35moe", "qwen3next"})

_MEDIUM_BATCH, _LARGE_BATCH = 1024, 2048
_CONSTRAINED_BATCH = 256
_SMALL_GPU_BYTES = 8 * 1024**3
_PREDICTION_SHARE_MAX = 0.8
_BATCH_SURCHARGE = ((_LARGE_BATCH, 0.60, 2048 * MIB), (_MEDIUM_BATCH, 0.75, 768 * MIB))
"""Batch, the share of free memory that the prediction may take for it, and what it adds (server/sched.go, v0.34)."""


@dataclass(frozen=True, slots=True)
class LoadParameters:
    """How a model is loaded, as far as its size depends on it."""

    context_length: int
    """Tokens of one slot, already cut to the trained context."""
    slots: int = 1
    kv_cache_type: str = "f16"
    flash_attention: bool | None = None
    """None: the server's own choice."""
    batch: int = DEFAULT_BATCH_TOKENS
    version: str | None = None
    """The server's; one that is not known counts as 0.24."""
    backend: Backend | None = None
    """None: what a server of that version runs the model in."""
    cuda_context_bytes: int = CUDA_CONTEXT_BYTES


@dataclass(frozen=True, slots=True)
class LayerSplit:
    """Whole layers of each GPU, in GPU order and in layer order, and the GPU that holds the output layer."""

    layers: tuple[int, ...]
    output_gpu: int


@lru_cache(maxsize=4096)
def footprint(facts: ModelFacts, split: LayerSplit, load: LoadParameters) -> Footprint:
    """Bytes on each GPU with the layers put as `split` says; a GPU that holds none takes nothing.

    With no GPUs `gpus` is empty, and the sums say what host memory a load takes.

    Raises:
        ValueError: an unknown `kv_cache_type`, or a number out of range; the text names it.
    """
    pieces = _pieces(facts, load, _gpus_in_use(split))
    if not split.layers:
        return _on_host(facts, pieces)
    first = next((gpu for gpu, count in enumerate(split.layers) if count), split.output_gpu)
    gpus: list[GpuFootprint] = []
    start = 0
    for gpu, count in enumerate(split.layers):
        stop = start + count
        gpus.append(_on_gpu(pieces, slice(start, stop), has_output=gpu == split.output_gpu, is_first=gpu == first))
        start = stop
    return Footprint.of(tuple(gpus))


def _gpus_in_use(split: LayerSplit) -> int:
    return sum(count > 0 or gpu == split.output_gpu for gpu, count in enumerate(split.layers))


def _on_gpu(pieces: _Pieces, layers: slice, *, has_output: bool, is_first: bool) -> GpuFootprint:
    weights, caches, states = pieces.layer_weights[layers], pieces.layer_caches[layers], pieces.layer_states[layers]
    if not weights and not has_output:
        return GpuFootprint()
    vision = pieces.vision_graph_bytes if (is_first if pieces.clip_on_first else has_output) else 0
    output = has_output * (pieces.unexplained_bytes + pieces.draft_bytes)
    return GpuFootprint(
        weights_bytes=sum(weights) + has_output * pieces.output_bytes,
        kv_cache_bytes=sum(caches) - sum(states),
        recurrent_state_bytes=sum(states),
        compute_buffer_bytes=pieces.compute_buffer_bytes + vision + output,
        projector_bytes=is_first * pieces.projector_bytes,
        cuda_context_bytes=pieces.cuda_context_bytes,
    )


def _on_host(facts: ModelFacts, pieces: _Pieces) -> Footprint:
    states = sum(pieces.layer_states)
    return Footprint(
        gpus=(),
        per_gpu_bytes=(),
        weights_bytes=facts.weights_bytes,
        kv_cache_bytes=sum(pieces.layer_caches) - states,
        recurrent_state_bytes=states,
        compute_buffer_bytes=pieces.compute_buffer_bytes + pieces.vision_graph_bytes,
    )


def is_blackwell(gpu: Gpu) -> bool:
    """Returns True if a CUDA context is larger on this GPU."""
    return gpu.compute_capability is not None and gpu.compute_capability >= _BLACKWELL


def cuda_context_bytes(gpus: Iterable[Gpu]) -> int:
    """Bytes of a CUDA context on each of these GPUs, at most."""
    return BLACKWELL_CONTEXT_BYTES if any(map(is_blackwell, gpus)) else CUDA_CONTEXT_BYTES


def even_split(layers: int, gpus: int) -> LayerSplit:
    """Layers over equal GPUs: as `split_by` with equal shares.

    Raises:
        ValueError: a negative number.
    """
    if gpus < 0:
        raise ValueError(f"gpus must not be negative: {gpus}")
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


def fill_first_split(facts: ModelFacts, free_bytes: Sequence[int], load: LoadParameters) -> LayerSplit | None:
    """Layers over unequal GPUs in the order given: each is filled with whole layers before the next is begun, and the
    output layer goes to the last GPU with layers or, where it has no room for it, to a later one.

    `free_bytes`: what each GPU may be given. None where not all layers and the output fit. Errors as `footprint`.
    """
    for gpus in (1, len(free_bytes)):  # over several, buffers are larger
        split = _filled(_pieces(facts, load, gpus), free_bytes)
        if split is None or _gpus_in_use(split) <= gpus:
            return split
    return None


def _filled(pieces: _Pieces, free_bytes: Sequence[int]) -> LayerSplit | None:
    counts = [0] * len(free_bytes)
    left = [free - pieces.fixed_bytes for free in free_bytes]
    gpu = 0
    for size in map(sum, zip(pieces.layer_weights, pieces.layer_caches, strict=True)):
        while gpu < len(left) and left[gpu] < size:
            gpu += 1
        if gpu == len(left):
            return None
        left[gpu] -= size
        counts[gpu] += 1
    output = pieces.output_bytes + pieces.projector_bytes + pieces.draft_bytes
    output_gpu = next((k for k in range(gpu, len(left)) if left[k] >= output), None)
    return None if output_gpu is None else LayerSplit(tuple(counts), output_gpu)


# --- weights ----------------------------------------------------------------------------------------------------


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


def as_llama_server_holds(facts: ModelFacts) -> ModelFacts:
    """The facts with per-layer token embeddings (gemma3n, gemma4) as input: llama.cpp keeps them in host memory
    (`LLM_TENSOR_PER_LAYER_TOKEN_EMBD` is `LLM_TENSOR_LAYER_INPUT`), Ollama's own engine with the output layer."""
    each_layer = facts.per_layer_input_bytes
    if not each_layer:
        return facts
    output = max(0, (facts.output_bytes or 0) - each_layer)
    return replace(facts, input_bytes=(facts.input_bytes or 0) + each_layer, output_bytes=output)


def layer_weights_bytes(facts: ModelFacts) -> tuple[int, ...]:
    """Weights of each layer: what is not input or output, in equal parts that sum up exactly."""
    return _equal_parts(weights_on_gpus_bytes(facts) - output_on_gpus_bytes(facts), facts.layers)


def _equal_parts(total: int, parts: int) -> tuple[int, ...]:
    return tuple(total * (part + 1) // parts - total * part // parts for part in range(parts))


# --- what a server chooses --------------------------------------------------------------------------------------


def uses_flash_attention(facts: ModelFacts, asked: bool | None, version: str | None = None) -> bool:
    """Whether a load uses flash attention. `asked`: None leaves it to the server, which on GPUs of compute capability
    7.0 and later chooses it for most architectures (FlashAttention; "auto" in llama-server), before 0.12 for none.

    From 0.30 the wish is passed on to llama-server, for every model. Before, never for embedding models, gemma2, or
    where key and value lengths differ (SupportsFlashAttention).
    """
    number = version_or_default(version)
    if asked is False:
        return False
    if number >= LLAMA_SERVER_SINCE:
        return True
    if facts.is_embedding or facts.architecture in _NEVER_FLASH or (asked is None and number < _FLASH_BY_DEFAULT_SINCE):
        return False
    if facts.key_length != facts.value_length and facts.architecture not in _FLASH_WITH_UNEQUAL_HEADS:
        return False
    if asked is None and facts.architecture == "gemma4":
        return number >= _GEMMA4_FLASH_SINCE
    return asked is True or facts.architecture not in _FLASH_ONLY_IF_ASKED


def effective_kv_cache_type(
    facts: ModelFacts, kv_cache_type: str, flash_attention: bool | None, version: str | None = None
) -> str:
    """The type that a server really uses: a quantised cache needs flash attention that was asked for explicitly
    (llm/server.go, v0.24: else it is ignored with a warning); f16 otherwise, which is never less."""
    quantised_ok = flash_attention is True and uses_flash_attention(facts, True, version)
    return kv_cache_type if quantised_ok else "f16"


def predicted_bytes(facts: ModelFacts, context_tokens: int) -> int:
    """What a server of 0.30 and later predicts before it loads (`PredictServerVRAM`): the file, and a cache of 16-bit
    numbers with the fewest KV heads of any layer and heads of width E / H. `context_tokens`: of all slots."""
    heads = max(1, min(facts.head_count_kv, default=1))
    width = facts.embedding_length // facts.head_count if facts.head_count else 0
    return facts.weights_bytes + 4 * facts.layers * heads * width * context_tokens


def batch_tokens(
    facts: ModelFacts,
    context_length: int,
    slots: int,
    version: str | None,
    flash_attention: bool | None = None,
    free_bytes: Sequence[int] = (),
) -> int:
    """`num_batch` where nothing sets it: 512 up to 0.24; from 0.30 by context and free memory (server/sched.go).

    By the tokens of all slots 512 up to 4,096, 1,024 up to 32,768, else 2,048, stepped down while the server's
    prediction leaves too little free; without flash attention 512, or 256 on a GPU of at most 8 GiB. Embedding models:
    2,048 or the context. `free_bytes`: of the GPUs of the instance; () gives the batch with plenty of memory.
    """
    number = version_or_default(version)
    if number < LLAMA_SERVER_SINCE:
        return DEFAULT_BATCH_TOKENS
    if facts.is_embedding:
        return min(_LARGE_BATCH, context_length)
    tokens = context_length * slots
    if not uses_flash_attention(facts, flash_attention, version):
        small = any(free <= _SMALL_GPU_BYTES for free in free_bytes)
        return _CONSTRAINED_BATCH if small and tokens > 4096 else DEFAULT_BATCH_TOKENS
    wished = DEFAULT_BATCH_TOKENS if tokens <= 4096 else _MEDIUM_BATCH if tokens <= 32_768 else _LARGE_BATCH
    return _batch_that_fits(wished, predicted_bytes(facts, tokens), sum(free_bytes))


def _batch_that_fits(wished: int, predicted: int, free: int) -> int:
    for batch, share, surcharge in _BATCH_SURCHARGE:
        limit = _PREDICTION_SHARE_MAX * free
        if batch <= wished and (not free or (predicted <= share * free and predicted + surcharge <= limit)):
            return batch
    return DEFAULT_BATCH_TOKENS


# --- putting them together --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Pieces:
    """The pieces that are put on GPUs: one figure for each layer, for the output, for each GPU in use."""

    layer_weights: tuple[int, ...]
    layer_caches: tuple[int, ...]
    """With recurrent state."""
    layer_states: tuple[int, ...]
    output_bytes: int
    projector_bytes: int
    compute_buffer_bytes: int
    vision_graph_bytes: int
    clip_on_first: bool
    """llama-server puts the image encoder on the first GPU, Ollama's own engine on that of the output layer."""
    unexplained_bytes: int
    draft_bytes: int
    cuda_context_bytes: int

    @property
    def fixed_bytes(self) -> int:
        return self.compute_buffer_bytes + self.vision_graph_bytes + self.unexplained_bytes + self.cuda_context_bytes


def _pieces(facts: ModelFacts, load: LoadParameters, gpus: int) -> _Pieces:
    for name, value in (("context_length", load.context_length), ("slots", load.slots), ("batch", load.batch)):
        if value < 1:
            raise ValueError(f"{name}: {value} must be at least 1")
    cache_bytes(load.kv_cache_type, 0)  # an unknown type is an error even where f16 would be used instead of it
    version = version_or_default(load.version)
    backend = load.backend or backend_of(facts, version)
    flash = uses_flash_attention(facts, load.flash_attention, load.version)
    cache_type = effective_kv_cache_type(facts, load.kv_cache_type, load.flash_attention, load.version)
    shape = GraphShape(load.context_length, load.slots, flash, load.batch, backend, version, max(1, gpus))
    has_clip = backend is Backend.LLAMA_CPP and version >= LLAMA_SERVER_SINCE
    if has_clip:
        facts = as_llama_server_holds(facts)
    projector = min(facts.projector_bytes, output_on_gpus_bytes(facts)) if has_clip else 0
    return _Pieces(
        layer_weights=layer_weights_bytes(facts),
        layer_caches=layer_cache_bytes(
            facts, load.context_length, load.slots, cache_type, load.batch, backend, version
        ),
        layer_states=layer_state_bytes(facts, load.slots),
        output_bytes=output_on_gpus_bytes(facts) - projector,
        projector_bytes=projector,
        compute_buffer_bytes=compute_buffer_bytes(facts, shape),
        vision_graph_bytes=vision_graph_bytes(facts, shape),
        clip_on_first=has_clip,
        unexplained_bytes=unexplained_bytes(facts, shape),
        draft_bytes=draft_context_bytes(facts, load.context_length, load.slots, version),
        cuda_context_bytes=load.cuda_context_bytes,
    )
