"""Large models in sparse files: a real GGUF header and tensor table, then a hole of the size of the weights.

Servers list, show and plan them like real models but cannot run them. They are written directly into a store, with a
manifest, to avoid uploading tens of gigabytes of zeros. The blob's digest covers only the header; servers do not
verify it.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np


@dataclass(frozen=True, slots=True)
class SparseSpec:
    """A llama model quantised to Q4_K_M; sizes in elements, `context` in tokens."""

    label: str
    """Parameter count as Ollama prints it, e.g. `70.6B`."""
    layers: int
    width: int
    feed_forward: int
    heads: int
    kv_heads: int = 8
    vocabulary: int = 128_256
    context: int = 131_072


LLAMA_8B = SparseSpec("8.0B", layers=32, width=4096, feed_forward=14_336, heads=32)
LLAMA_70B = SparseSpec("70.6B", layers=80, width=8192, feed_forward=28_672, heads=64)
LLAMA_405B = SparseSpec("405.9B", layers=126, width=16_384, feed_forward=53_248, heads=128)


def put_into_store(models: Path, name: str, spec: SparseSpec, tag: str = "latest") -> int:
    """Writes the blobs and manifest of `name:tag` into the store at `models`; returns the weights' size in bytes."""
    blobs = models / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    staging = blobs / f".{name}-{tag}"
    size = _write_gguf(staging, spec)
    with staging.open("rb") as file:
        digest = hashlib.sha256(name.encode() + file.read(2**20)).hexdigest()
    staging.rename(blobs / f"sha256-{digest}")
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{digest}", "size": size}
    _write_manifest(models, name, tag, spec, layer)
    return size


def _write_manifest(models: Path, name: str, tag: str, spec: SparseSpec, layer: dict[str, Any]) -> None:
    config = {
        "model_format": "gguf",
        "model_family": "llama",
        "model_families": ["llama"],
        "model_type": spec.label,
        "file_type": "Q4_K_M",
        "architecture": "amd64",
        "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]},
    }
    data = json.dumps(config).encode()
    digest = hashlib.sha256(data).hexdigest()
    (models / "blobs" / f"sha256-{digest}").write_bytes(data)
    media_type = "application/vnd.docker.container.image.v1+json"
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
        "config": {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)},
        "layers": [layer],
    }
    path = models / "manifests" / "registry.ollama.ai" / "library" / name / tag
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(manifest), encoding="utf-8")


def _write_gguf(path: Path, spec: SparseSpec) -> int:
    """Writes header and tensor table, then a hole; returns the file size in bytes."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_K_M)
    writer.add_context_length(spec.context)
    writer.add_block_count(spec.layers)
    writer.add_embedding_length(spec.width)
    writer.add_feed_forward_length(spec.feed_forward)
    writer.add_head_count(spec.heads)
    writer.add_head_count_kv(spec.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(spec.width // spec.heads)
    writer.add_vocab_size(spec.vocabulary)
    length = 0
    for name, shape, media_type in _tensors(spec):
        block, width = gguf.GGML_QUANT_SIZES[media_type]
        count = int(np.prod(shape)) // block * width
        writer.add_tensor_info(name, shape, np.dtype(np.float32), count, raw_dtype=media_type)
        length += gguf.GGUFWriter.ggml_pad(count, writer.data_alignment)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    header = gguf.GGUFWriter.ggml_pad(path.stat().st_size, writer.data_alignment)
    os.truncate(path, header + length)
    return header + length


def _tensors(spec: SparseSpec) -> list[tuple[str, tuple[int, ...], gguf.GGMLQuantizationType]]:
    """Tensor names, shapes (rows first) and types; Q4_K_M stores half of the value and down matrices as Q6_K."""
    f32, q4, q6 = (getattr(gguf.GGMLQuantizationType, name) for name in ("F32", "Q4_K", "Q6_K"))
    width, hidden_width, kv = spec.width, spec.feed_forward, spec.kv_heads * spec.width // spec.heads
    tensors = [("token_embd.weight", (spec.vocabulary, width), q4)]
    for layer in range(spec.layers):
        mixed = q6 if layer < spec.layers // 8 or layer >= 7 * spec.layers // 8 or layer % 3 == 2 else q4
        block = f"blk.{layer}."
        tensors += [
            (block + "attn_norm.weight", (width,), f32),
            (block + "attn_q.weight", (width, width), q4),
            (block + "attn_k.weight", (kv, width), q4),
            (block + "attn_v.weight", (kv, width), mixed),
            (block + "attn_output.weight", (width, width), q4),
            (block + "ffn_norm.weight", (width,), f32),
            (block + "ffn_gate.weight", (hidden_width, width), q4),
            (block + "ffn_up.weight", (hidden_width, width), q4),
            (block + "ffn_down.weight", (width, hidden_width), mixed),
        ]
    return [*tensors, ("output_norm.weight", (width,), f32), ("output.weight", (spec.vocabulary, width), q6)]
