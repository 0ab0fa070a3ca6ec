"""Describes a GGUF file the way `/api/show` describes a model, so that one set of rules reads both.

Pure: it takes a header that was read elsewhere (`gguf_header.py`) and opens no file.

Source of the capabilities: Ollama v0.24, `server/images.go` (Capabilities).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from router.engines.ollama.client import ShowReply, TensorRow
from router.engines.ollama.ggml_types import tensor_bytes

_SKIPPED_PREFIX = "tokenizer."
"""Vocabularies: long lists that no size depends on."""


def show_reply(
    metadata: Mapping[str, Any],
    tensors: Iterable[tuple[str, str, Sequence[int]]],
    parameters: Mapping[str, Any] | None = None,
    *,
    has_projector_file: bool = False,
) -> ShowReply:
    """The reply of `/api/show` for a model with this header.

    `tensors`: name, ggml type and shape, row length first. `parameters`: of the Modelfile. `has_projector_file`: the
    model has an image encoder in a second file.
    """
    rows = tuple(TensorRow(name, kind, tuple(shape)) for name, kind, shape in tensors)
    info = {
        key: msgspec.Raw(msgspec.json.encode(value))
        for key, value in metadata.items()
        if not key.startswith(_SKIPPED_PREFIX)
    }
    return ShowReply(
        parameters="\n".join(f"{name} {value}" for name, value in (parameters or {}).items()),
        model_info=info,
        tensors=rows,
        capabilities=_capabilities(metadata, rows, has_projector_file),
        projector_info={"general.type": msgspec.Raw(b'"mmproj"')} if has_projector_file else None,
    )


def tensors_bytes(tensors: Iterable[TensorRow]) -> int | None:
    """Bytes of all tensors; None without any, or where the type of one is not in the table."""
    sizes = [tensor_bytes(tensor.type, tensor.shape) for tensor in tensors]
    known_sizes = [size for size in sizes if size is not None]
    return sum(known_sizes) if known_sizes and len(known_sizes) == len(sizes) else None


def active_share(metadata: Mapping[str, Any], tensors: Iterable[TensorRow]) -> float:
    """Share of the weights that one token reads: below 1 for mixtures of experts."""
    kind = metadata.get("general.architecture", "")
    expert_count, used_count = (
        _whole_number(metadata.get(f"{kind}.{key}")) for key in ("expert_count", "expert_used_count")
    )
    if not expert_count or not used_count:
        return 1.0
    sizes = {tensor.name: tensor_bytes(tensor.type, tensor.shape) or 0 for tensor in tensors}
    experts = sum(size for name, size in sizes.items() if "_exps." in name)
    return 1.0 - experts / max(1, sum(sizes.values())) * (1.0 - min(1.0, used_count / expert_count))


def _whole_number(value: object) -> int:
    return value if isinstance(value, int) else 0


def _capabilities(metadata: Mapping[str, Any], tensors: Sequence[TensorRow], has_projector: bool) -> tuple[str, ...]:
    kind = metadata.get("general.architecture", "")
    names = ["embedding" if f"{kind}.pooling_type" in metadata else "completion"]
    has_encoder = f"{kind}.vision.block_count" in metadata or any(tensor.name.startswith("v.") for tensor in tensors)
    return (*names, "vision") if has_projector or has_encoder else tuple(names)
