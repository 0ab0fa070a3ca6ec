"""Bytes of VRAM that a loaded model uses on each GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from router.domain.model import BlobDigest


@dataclass(frozen=True, slots=True)
class Footprint:
    """An estimated footprint. `per_gpu_bytes` is in the GPU order of the placement; the parts are totals."""

    per_gpu_bytes: tuple[int, ...]
    weights_bytes: int
    kv_cache_bytes: int
    compute_buffer_bytes: int
    cuda_context_bytes: int

    @property
    def total_bytes(self) -> int:
        return sum(self.per_gpu_bytes)


FootprintKind = tuple[BlobDigest, int, str, bool | None, str]
"""A `FootprintKey` without context, slots and cache type."""


class FootprintKey(NamedTuple):
    """What a load's size depends on."""

    blob: BlobDigest
    gpus: int
    context_length: int
    slots: int
    kv_cache_type: str
    split: str = ""
    """Shares of the GPUs in the format of `LLAMA_ARG_TENSOR_SPLIT`; "" if they are equal."""
    flash_attention: bool | None = None
    version: str = ""
    """The part of the server's version that footprints depend on, e.g. `0.33`; "" if it is unknown."""

    @property
    def kind(self) -> FootprintKind:
        return self.blob, self.gpus, self.split, self.flash_attention, self.version
