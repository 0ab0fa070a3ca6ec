"""GGUF models of random weights for GPU machines: the head is written here, the gigabytes of weights there.

`write_head` needs the package `gguf`; `write_model` needs nothing but Python, for a bare machine. The weights repeat
a random block: the answers make no sense, sizes and speeds are those of a model of that shape.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import gguf

ALIGNMENT = 32
_TILE_BLOCKS = 65_521
"""Blocks of random weights before they repeat: a prime, so that no two rows of a matrix are the same."""
_VALUES_PER_BLOCK = 32
_CONTROLS = ("<unk>", "<s>", "</s>")


@dataclass(frozen=True, slots=True)
class Shape:
    """Layers, widths in elements, heads, and experts (0: a dense model). `weights` is the type of all matrices."""

    architecture: str
    weights: str
    layers: int
    width: int
    feed_forward: int
    heads: int
    kv_heads: int
    head_width: int
    experts: int = 0
    experts_used: int = 0
    vocabulary: int = 32_000
    context: int = 131_072


SHAPES = {
    "dense-1g": Shape("llama", "Q8_0", 16, 2048, 8192, 32, 8, 64),
    "experts-4g": Shape("qwen3moe", "Q4_0", 24, 2048, 768, 32, 4, 128, experts=64, experts_used=8),
    "dense-8g": Shape("llama", "Q8_0", 32, 4096, 14_336, 32, 8, 128),
}
"""By name; the number is the size of the file in gigabytes."""


def write_head(folder: Path, name: str, shape: Shape) -> None:
    """Writes `NAME.head`, the file up to its weights, and `NAME.json`: type and bytes of each tensor, in order."""
    # Missing on the machine that only calls write_model.
    import gguf  # noqa: PLC0415
    import numpy as np  # noqa: PLC0415

    head = folder / f"{name}.head"
    writer = gguf.GGUFWriter(head, shape.architecture)
    _add_metadata(writer, shape)
    segments: list[tuple[str, int]] = []
    for tensor, dimensions in _tensors(shape):
        kind = "F32" if len(dimensions) == 1 or "gate_inp" in tensor else shape.weights
        elements = 1
        for size in dimensions:
            elements *= size
        of_type = gguf.GGMLQuantizationType[kind]
        block_values, block_bytes = gguf.GGML_QUANT_SIZES[of_type]
        segments.append((kind, elements // block_values * block_bytes))
        # Any type but bytes: dimensions are then in elements.
        writer.add_tensor_info(tensor, dimensions, np.dtype(np.float16), segments[-1][1], of_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    (folder / f"{name}.json").write_text(json.dumps(segments), encoding="utf-8")


def write_model(folder: Path, name: str, target: Path, seed: int = 1) -> str:
    """Writes the whole model to `target`. Returns its digest in Ollama's form: `sha256:` and 64 hex digits."""
    digest = hashlib.sha256()
    head = (folder / f"{name}.head").read_bytes()
    tiles = {"F32": struct.pack("<f", 1.0) * 8192, "Q8_0": _tile("Q8_0", seed), "Q4_0": _tile("Q4_0", seed)}
    offset = 0
    with target.open("wb") as file:

        def put(data: bytes | memoryview) -> None:
            file.write(data)
            digest.update(data)

        put(head + bytes(-len(head) % ALIGNMENT))
        for kind, size in json.loads((folder / f"{name}.json").read_text(encoding="utf-8")):
            tile = memoryview(tiles[kind])
            unit = {"F32": 4, "Q8_0": 34, "Q4_0": 18}[kind]
            at, left = offset % (len(tile) // unit) * unit, size
            while left:
                part = tile[at : at + left]
                put(part)
                at, left = 0, left - len(part)
            offset += size // unit
            put(bytes(-size % ALIGNMENT))
    return "sha256:" + digest.hexdigest()


def _tile(kind: str, seed: int) -> bytes:
    """Blocks of one type: a scale in float16, then 32 random values with a standard deviation of about 0.02."""
    generator = random.Random(seed)
    scale, size = {"Q8_0": (0.02 / 74, 32), "Q4_0": (0.02 / 4.6, 16)}[kind]
    head = struct.pack("<e", scale)
    return b"".join(head + generator.randbytes(size) for _ in range(_TILE_BLOCKS))


def _add_metadata(writer: gguf.GGUFWriter, shape: Shape) -> None:
    import gguf  # noqa: PLC0415

    writer.add_name("random weights")
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{shape.weights}"])
    writer.add_context_length(shape.context)
    writer.add_block_count(shape.layers)
    writer.add_embedding_length(shape.width)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_width)
    writer.add_value_length(shape.head_width)
    writer.add_rope_dimension_count(shape.head_width)
    writer.add_layer_norm_rms_eps(1e-5)
    if shape.experts:
        writer.add_expert_count(shape.experts)
        writer.add_expert_used_count(shape.experts_used)
        writer.add_expert_feed_forward_length(shape.feed_forward)
    kind = gguf.TokenType
    tokens = [*_CONTROLS, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += ["▁" + word for word in itertools.islice(_words(), shape.vocabulary - len(tokens))]
    types = [kind.UNKNOWN, kind.CONTROL, kind.CONTROL, *[kind.BYTE] * 256]
    writer.add_tokenizer_model("llama")
    writer.add_vocab_size(len(tokens))
    writer.add_token_list(tokens)
    writer.add_token_types([*types, *[kind.NORMAL] * (len(tokens) - len(types))])
    writer.add_token_scores([-float(index) for index in range(len(tokens))])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)


def _words() -> itertools.chain[str]:
    """Distinct made-up words of two and three syllables."""
    syllables = ["".join(pair) for pair in itertools.product("bdfghklmnprstvz", "aeiou")]
    return itertools.chain.from_iterable(map("".join, itertools.product(syllables, repeat=length)) for length in (2, 3))


def _tensors(shape: Shape) -> list[tuple[str, tuple[int, ...]]]:
    """Names and dimensions, the outermost first, as `gguf` takes them."""
    attention, key = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    found: list[tuple[str, tuple[int, ...]]] = [("token_embd.weight", (shape.vocabulary, shape.width))]
    for layer in range(shape.layers):
        block = f"blk.{layer}."
        found += [
            (block + "attn_norm.weight", (shape.width,)),
            (block + "attn_q.weight", (attention, shape.width)),
            (block + "attn_k.weight", (key, shape.width)),
            (block + "attn_v.weight", (key, shape.width)),
            (block + "attn_output.weight", (shape.width, attention)),
            (block + "ffn_norm.weight", (shape.width,)),
        ]
        if shape.architecture == "qwen3moe":
            found += [(block + f"attn_{part}_norm.weight", (shape.head_width,)) for part in "qk"]
            found += [(block + "ffn_gate_inp.weight", (shape.experts, shape.width))]
        many, suffix = ((shape.experts,), "_exps") if shape.experts else ((), "")
        found += [
            (block + f"ffn_gate{suffix}.weight", (*many, shape.feed_forward, shape.width)),
            (block + f"ffn_up{suffix}.weight", (*many, shape.feed_forward, shape.width)),
            (block + f"ffn_down{suffix}.weight", (*many, shape.width, shape.feed_forward)),
        ]
    return [*found, ("output_norm.weight", (shape.width,)), ("output.weight", (shape.vocabulary, shape.width))]
