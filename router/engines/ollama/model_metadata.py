"""Reads `ModelFacts` out of what `/api/tags` and `/api/show` say of a model.

Pure: it asks nobody. What an answer lacks is filled from the tensor table, and where that is silent too, by the value
that makes the model look larger. Where the fallbacks are needed: bert has no KV head count and no key length, qwen2
no vocabulary size, 0.11.4 names no tensor type younger than itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

import msgspec

from router.domain.model import BlobDigest, ModelFacts
from router.engines.ollama.client import ShowReply, TagRow, TensorRow
from router.engines.ollama.ggml_types import tensor_bytes
from router.engines.ollama.runner_options import runner_parameters
from router.errors import UNREADABLE_JSON

_T = TypeVar("_T")
_Info = Mapping[str, msgspec.Raw]

_WEIGHTS_LINE = re.compile(r"^FROM .*sha256[-:]([0-9a-f]{64})\"?\s*$", re.MULTILINE)
_STUB_BYTES_MAX = 1 << 20
"""A model of this size has no weights of its own."""
_LAYER = re.compile(r"blk\.(\d+)\.")

_INPUT_PARTS = frozenset({"token_embd", "position_embd", "token_types", "token_norm_embd"})
"""Tensors that stay in host memory (Ollama's ml/backend/ggml/ggml.go, `input.bts`; llama.cpp's input layer)."""

_OUTPUT_PARTS = frozenset(
    {
        "altup_proj",
        "altup_unembd_proj",
        "cls",
        "mm",
        "output",
        "output_norm",
        "per_layer_model_proj",
        "per_layer_proj_norm",
        "per_layer_token_embd",
        "v",
    }
)
"""First parts of the names of tensors that go to the output layer's GPU (the same file, `output.bts`)."""

_PER_LAYER_INPUT_PARTS = frozenset({"per_layer_token_embd"})

_PROJECTOR_PARTS = frozenset({"a", "mm", "v"})
"""First parts of the names of tensors of image and sound encoders (llm/llama_server.go, mmprojMemoryRequirement)."""

_ARRAYS = ("attention.head_count", "attention.head_count_kv")


def needs_verbose(reply: ShowReply) -> bool:
    """True where the answer holds a per-layer array without its values: they come only with `verbose`."""
    info = reply.model_info or {}
    kind = _architecture(info)
    return any(_value(info, f"{kind}.{key}", list[int]) == [] or _is_null(info, f"{kind}.{key}") for key in _ARRAYS)


def read_facts(tag: TagRow, reply: ShowReply) -> ModelFacts | None:
    """The facts of a model; None for one that has no weights here (a cloud model's stub).

    Weights in a format that the server does not describe (no `FROM` line of a blob, as with safetensors) are opaque:
    known by their manifest, with an unknown number of layers.
    `weights_bytes` is the size in `/api/tags`, which also counts the template, parameters and licence: kilobytes.
    `input_bytes` is 0 for a model without an output layer of its own: the embedding table then is on the GPUs too.
    """
    blob = _WEIGHTS_LINE.search(reply.modelfile)
    if tag.remote_host or (blob is None and tag.size < _STUB_BYTES_MAX):
        return None
    info, tensors = reply.model_info or {}, reply.tensors or ()
    kind = _architecture(info)
    table = next((t for t in tensors if t.name == "token_embd.weight"), None)
    layers = _number(info, f"{kind}.block_count") or _layers(tensors)
    width = _number(info, f"{kind}.embedding_length") or (_dimension(table, 0) or 0)
    heads = _heads(info, f"{kind}.attention.head_count", layers)
    head_count = max(heads, default=0)
    head_width = width // head_count if head_count else 0
    key_length = _number(info, f"{kind}.attention.key_length") or head_width
    is_embedding = _is_embedding(reply, info, kind)
    input_bytes, output_bytes = _ends_bytes(tensors, is_embedding=is_embedding)
    projector_file_bytes = _projector_file_bytes(tag, reply)
    if output_bytes is not None:
        output_bytes += projector_file_bytes
    return ModelFacts(
        name=tag.name,
        digest=tag.digest,
        blob=BlobDigest(f"sha256:{blob[1]}" if blob is not None else f"manifest:{tag.digest}"),
        weights_bytes=tag.size,
        architecture=kind,
        layers=0 if blob is None else layers,
        embedding_length=width,
        head_count=head_count,
        head_count_kv=_kv_heads(info, kind, heads, layers),
        key_length=key_length,
        value_length=_number(info, f"{kind}.attention.value_length") or head_width,
        vocabulary_size=_number(info, f"{kind}.vocab_size") or (_dimension(table, 1) or 0),
        context_length=_number(info, f"{kind}.context_length"),
        sliding_window=_number(info, f"{kind}.attention.sliding_window") or None,
        sliding_layers=_sliding_layers(info, kind, layers),
        key_length_swa=_number(info, f"{kind}.attention.key_length_swa") or None,
        value_length_swa=_number(info, f"{kind}.attention.value_length_swa") or None,
        shared_kv_layers=min(layers, _number(info, f"{kind}.attention.shared_kv_layers")),
        full_attention_interval=_number(info, f"{kind}.full_attention_interval"),
        recurrent_state_elements=_recurrent_elements(info, kind, width),
        nextn_layers=_number(info, f"{kind}.nextn_predict_layers") or _draft_layers(tensors),
        feed_forward_length=_number(info, f"{kind}.feed_forward_length"),
        expert_used_count=_number(info, f"{kind}.expert_used_count") or min(8, _number(info, f"{kind}.expert_count")),
        has_vision="vision" in (reply.capabilities or ()),
        projector_bytes=projector_file_bytes or _sum_bytes(tensors, _PROJECTOR_PARTS) or 0,
        per_layer_input_bytes=_sum_bytes(tensors, _PER_LAYER_INPUT_PARTS) or 0,
        parameters=_parameters(reply.parameters or ""),
        is_embedding=is_embedding,
        input_bytes=input_bytes,
        output_bytes=output_bytes,
        is_opaque=blob is None,
    )


def _projector_file_bytes(tag: TagRow, reply: ShowReply) -> int:
    """Size of an image encoder in a second file: what the model has beyond its tensors, vocabulary included."""
    if not reply.projector_info or not reply.tensors:
        return 0
    sizes = [tensor_bytes(tensor.type, tensor.shape) for tensor in reply.tensors]
    known = [size for size in sizes if size is not None]
    return max(0, tag.size - sum(known)) if len(known) == len(sizes) else 0


def _architecture(info: _Info) -> str:
    return _value(info, "general.architecture", str) or ""


def _value(info: _Info, key: str, kind: type[_T]) -> _T | None:
    """The value of a key, or None where it is missing, null or of another type."""
    raw = info.get(key)
    if raw is None:
        return None
    try:
        return msgspec.json.decode(raw, type=kind | None)
    except UNREADABLE_JSON:
        return None


def _is_null(info: _Info, key: str) -> bool:
    return key in info and bytes(info[key]).strip() == b"null"


def _number(info: _Info, key: str) -> int:
    """A count; the largest where there is one for each layer; 0 where there is none."""
    return max(_value(info, key, int) or 0, *(_value(info, key, list[int]) or [0]), 0)


def _heads(info: _Info, key: str, layers: int) -> tuple[int, ...]:
    """One count for each layer; () where there is none."""
    each = _value(info, key, list[int])
    if each:
        return tuple(max(0, count) for count in (*each, *each[-1:] * layers)[:layers])
    single = _number(info, key)
    return (single,) * layers if single else ()


def _kv_heads(info: _Info, kind: str, heads: tuple[int, ...], layers: int) -> tuple[int, ...]:
    """KV heads of each layer; without a word of them as many as heads, as in plain multi-head attention (bert)."""
    return _heads(info, f"{kind}.attention.head_count_kv", layers) or heads


def _sliding_layers(info: _Info, kind: str, layers: int) -> tuple[bool, ...]:
    """The pattern of sliding layers as the file has it, one value a layer; () where it has none or another length."""
    pattern = _value(info, f"{kind}.attention.sliding_window_pattern", list[bool])
    return tuple(pattern) if pattern and len(pattern) == layers else ()


def _recurrent_elements(info: _Info, kind: str, width: int) -> int:
    """32-bit numbers that a layer without attention keeps for a sequence.

    State-space layers: (kernel - 1)(inner + 2 groups x state) of convolution and state x inner (llama.cpp
    `llama_hparams::n_embd_r`, `n_embd_s`). Short convolutions (lfm2): (kernel - 1) x width.
    """
    kernel, state = _number(info, f"{kind}.ssm.conv_kernel"), _number(info, f"{kind}.ssm.state_size")
    inner, groups = _number(info, f"{kind}.ssm.inner_size"), _number(info, f"{kind}.ssm.group_count")
    if inner:
        return max(0, kernel - 1) * (inner + 2 * groups * state) + state * inner
    return max(0, _number(info, f"{kind}.shortconv.l_cache") - 1) * width


def _draft_layers(tensors: Sequence[TensorRow]) -> int:
    """Draft layers of files that do not count them: older ones have tensors named `mtp.`."""
    return int(any(tensor.name.startswith("mtp.") for tensor in tensors))


def _dimension(tensor: TensorRow | None, index: int) -> int | None:
    return tensor.shape[index] if tensor is not None and len(tensor.shape) > index else None


def _layers(tensors: Sequence[TensorRow]) -> int:
    """Layers by the tensors' names, where the model's facts do not count them."""
    numbers = [int(match[1]) for tensor in tensors if (match := _LAYER.match(tensor.name)) is not None]
    return max(numbers, default=-1) + 1


def _ends_bytes(tensors: Sequence[TensorRow], *, is_embedding: bool) -> tuple[int | None, int | None]:
    """Bytes that only host memory holds, and bytes of the output layer; None where a tensor's type is not known.

    An embedding model makes no logits, so it needs no second copy of its embedding table for them.
    """
    if not tensors:
        return None, None
    first, last = _sum_bytes(tensors, _INPUT_PARTS), _sum_bytes(tensors, _OUTPUT_PARTS)
    if any(tensor.name == "output.weight" for tensor in tensors) or is_embedding or _is_encoder(tensors):
        return first, last
    table = _sum_bytes(tensors, frozenset({"token_embd"}))
    return 0, None if last is None or table is None else last + table


def _is_encoder(tensors: Sequence[TensorRow]) -> bool:
    """True for models that make no logits, so that no output layer is missing: bert and its kin norm their input."""
    return any(tensor.name.startswith("token_embd_norm") for tensor in tensors)


def _sum_bytes(tensors: Sequence[TensorRow], parts: frozenset[str]) -> int | None:
    sizes = [tensor_bytes(t.type, t.shape) for t in tensors if t.name.partition(".")[0] in parts]
    known = [size for size in sizes if size is not None]
    return sum(known) if len(known) == len(sizes) else None


def _is_embedding(reply: ShowReply, info: _Info, kind: str) -> bool:
    """By its capabilities; by its pooling where a server does not tell them."""
    if reply.capabilities:
        return "embedding" in reply.capabilities and "completion" not in reply.capabilities
    return f"{kind}.pooling_type" in info


def _parameters(text: str) -> tuple[tuple[str, str], ...]:
    """The lines that matter to a runner."""
    lines = (line.partition(" ") for line in text.splitlines())
    return runner_parameters((name, value) for name, _, value in lines)
