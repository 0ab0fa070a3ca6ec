"""Bytes of VRAM that a loaded model uses on each GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from router.domain.model import BlobDigest


@dataclass(frozen=True, slots=True)
class GpuFootprint:
    """Bytes that a loaded model takes on one GPU, by part."""

    weights_bytes: int = 0
    """Layers on this GPU, and the output layer where it is here."""
    kv_cache_bytes: int = 0
    recurrent_state_bytes: int = 0
    """State of layers without attention."""
    compute_buffer_bytes: int = 0
    """Working memory: the compute graph, an image encoder's graph and a draft context included."""
    projector_bytes: int = 0
    """Image and sound encoders with their projectors, where the server loads them beside the model."""
    cuda_context_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        return (
            self.weights_bytes
            + self.kv_cache_bytes
            + self.recurrent_state_bytes
            + self.compute_buffer_bytes
            + self.projector_bytes
            + self.cuda_context_bytes
        )


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a loaded model takes on each GPU of a placement, in the placement's GPU order, and the sums by part."""

    gpus: tuple[GpuFootprint, ...]
    per_gpu_bytes: tuple[int, ...]
    weights_bytes: int = 0
    kv_cache_bytes: int = 0
    recurrent_state_bytes: int = 0
    compute_buffer_bytes: int = 0
    projector_bytes: int = 0
    cuda_context_bytes: int = 0

    @classmethod
    def of(cls, gpus: tuple[GpuFootprint, ...]) -> Footprint:
        """The footprint with these parts on its GPUs."""
        return cls(
            gpus=gpus,
            per_gpu_bytes=tuple(gpu.total_bytes for gpu in gpus),
            weights_bytes=sum(gpu.weights_bytes for gpu in gpus),
            kv_cache_bytes=sum(gpu.kv_cache_bytes for gpu in gpus),
            recurrent_state_bytes=sum(gpu.recurrent_state_bytes for gpu in gpus),
            compute_buffer_bytes=sum(gpu.compute_buffer_bytes for gpu in gpus),
            projector_bytes=sum(gpu.projector_bytes for gpu in gpus),
            cuda_context_bytes=sum(gpu.cuda_context_bytes for gpu in gpus),
        )

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


class MeasuredFootprint(NamedTuple):
    """What one load was seen to take."""

    key: FootprintKey
    per_gpu_bytes: tuple[int, ...]
    """CUDA contexts included."""
    parts: tuple[GpuFootprint, ...] = ()
    """By part on each GPU, where the server's own output told it; with the CUDA contexts as measured."""
