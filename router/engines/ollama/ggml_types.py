"""Sizes in bytes: of tensors by ggml type and shape, and of KV cache rows by cache type.

The table is that of ggml.c (`ggml_type_size` and `ggml_blck_size`): quantised values are stored in blocks, each with
its own scales.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

GGML_BLOCKS: Mapping[str, tuple[int, int]] = {
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "F64": (1, 8),
    "I8": (1, 1),
    "I16": (1, 2),
    "I32": (1, 4),
    "I64": (1, 8),
    "Q1_0": (128, 18),
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "Q8_1": (32, 40),
    "MXFP4": (32, 17),
    "NVFP4": (64, 36),
    "Q2_K": (256, 84),
    "Q3_K": (256, 110),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
    "Q8_K": (256, 292),
    "IQ1_S": (256, 50),
    "IQ1_M": (256, 56),
    "IQ2_XXS": (256, 66),
    "IQ2_XS": (256, 74),
    "IQ2_S": (256, 82),
    "IQ3_XXS": (256, 98),
    "IQ3_S": (256, 110),
    "IQ4_NL": (32, 18),
    "IQ4_XS": (256, 136),
    "TQ1_0": (256, 54),
    "TQ2_0": (256, 66),
}
"""ggml type -> (elements per block, bytes per block)."""


def tensor_bytes(ggml_type: str, shape: Sequence[int]) -> int | None:
    """Bytes of a tensor; None for a type that is not in the table (Ollama prints `unknown` for types without a name).

    `shape` is in ggml's order, row length first. Each row is padded to whole blocks.
    """
    block = GGML_BLOCKS.get(ggml_type.upper())
    if block is None:
        return None
    rows = math.prod(shape[1:])
    return row_bytes(block, shape[0] if shape else 1) * rows


def row_bytes(block: tuple[int, int], elements: int) -> int:
    """Bytes of a row of `elements`, rounded up to whole blocks (`ggml_row_size`). `block`: a value of `GGML_BLOCKS`."""
    block_elements, block_bytes = block
    return -(-elements // block_elements) * block_bytes


def cache_bytes(kv_cache_type: str, elements: int) -> int:
    """Bytes of a row of `elements` in a KV cache of type `f16`, `q8_0`, `q4_0`, …; "" means f16, as in Ollama.

    Raises:
        ValueError: no such ggml type.
    """
    block = GGML_BLOCKS.get(kv_cache_type.upper() or "F16")
    if block is None:
        raise ValueError(f"kv_cache_type: {kv_cache_type!r} is not a ggml type; use f16, q8_0 or q4_0")
    return row_bytes(block, elements)
