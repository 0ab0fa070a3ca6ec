"""Reads the header of a GGUF file: its metadata and tensor table, nothing of the weights.

After the GGUF specification (ggml, docs/gguf.md), versions 2 and 3, little endian. Long lists are kept as they are;
whoever prints them shortens them.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_FLOAT, _STRING, _ARRAY = 6, 8, 9
_LIMIT = 1 << 28
"""No single string or list of a header is longer."""

TYPES = {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
         12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
         20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
         29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4"}  # fmt: skip
"""ggml's type numbers (ggml.h)."""

FILE_TYPES = {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S",
              12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K",
              32: "BF16", 38: "MXFP4"}  # fmt: skip
"""`general.file_type` as Ollama prints it."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One row of the tensor table; the shape is ggml's, row length first."""

    name: str
    type: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Header:
    metadata: dict[str, Any]
    tensors: tuple[Tensor, ...]


def read_header(path: Path) -> Header | None:
    """The header; None where the file is not a GGUF or its header is broken."""
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF" or _scalar(file, "<I") not in (2, 3):
                return None
            tensors, pairs = _scalar(file, "<Q"), _scalar(file, "<Q")
            metadata = dict(_pair(file) for _ in range(pairs))
            return Header(metadata, tuple(_tensor(file) for _ in range(tensors)))
    except (OSError, ValueError, KeyError, struct.error, MemoryError):
        return None


def _scalar(file: BinaryIO, form: str) -> Any:
    value = struct.unpack(form, file.read(struct.calcsize(form)))[0]
    return single(value) if form == "<f" else value


def single(value: float) -> float:
    """A single-precision value as the double that prints as short as Go prints a float32."""
    for digits in range(6, 9):
        short = float(f"{value:.{digits}g}")
        if struct.pack("<f", short) == struct.pack("<f", value):
            return short
    return float(f"{value:.9g}")


def _string(file: BinaryIO) -> str:
    length = _scalar(file, "<Q")
    if length > _LIMIT:
        raise ValueError("string too long")
    return file.read(length).decode(errors="replace")


def _pair(file: BinaryIO) -> tuple[str, Any]:
    return _string(file), _value(file, _scalar(file, "<I"))


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(file)
    if kind != _ARRAY:
        return _scalar(file, _SCALARS[kind])
    inner, count = _scalar(file, "<I"), _scalar(file, "<Q")
    if count > _LIMIT:
        raise ValueError("list too long")
    if inner in (_STRING, _ARRAY):
        return [_value(file, inner) for _ in range(count)]
    form = f"<{count}{_SCALARS[inner][1]}"
    values = list(struct.unpack(form, file.read(struct.calcsize(form))))
    return [single(value) for value in values] if inner == _FLOAT else values


def _tensor(file: BinaryIO) -> Tensor:
    name = _string(file)
    shape = tuple(_scalar(file, "<Q") for _ in range(_scalar(file, "<I")))
    kind = _scalar(file, "<I")
    _scalar(file, "<Q")
    return Tensor(name, TYPES.get(kind, "unknown"), shape)
