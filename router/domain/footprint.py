"""Bytes of VRAM that a loaded model takes on each GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from router.domain.model import BlobDigest


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a loaded model takes: bytes on each GPU of a placement, in the placement's GPU order."""

    per_gpu_bytes: tuple[int, ...]
    weights_bytes: int
    kv_cache_bytes: int
    compute_buffer_bytes: int
    cuda_context_bytes: int

    @property
    def total_bytes(self) -> int:
        return sum(self.per_gpu_bytes)


FootprintKind = tuple[BlobDigest, int, str, bool | None, str]
"""All of a `FootprintKey` but context, slots and cache type."""


class FootprintKey(NamedTuple):
    """What a load's size depends on."""

    blob: BlobDigest
    gpus: int
    context_length: int
    slots: int
    kv_cache_type: str
    split: str = ""
    """Shares of the GPUs where they are not even, as `LLAMA_ARG_TENSOR_SPLIT` has them."""
    flash_attention: bool | None = None
    version: str = ""
    """Of the server, as far as what it takes may differ by it: `0.33`; "" where it has not told."""

    @property
    def kind(self) -> FootprintKind:
        return self.blob, self.gpus, self.split, self.flash_attention, self.version
