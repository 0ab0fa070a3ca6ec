"""How fast each replica evaluates prompts and generates: estimated from its GPUs, then corrected by measurements.

A generation step reads all weights once, so its duration follows from the memory bandwidth of the GPUs. In the time of
one step some tens of prompt tokens are evaluated. Ended requests correct both figures, for their replica and for their
model. Replicas without data use the correction of the model, because the error of the estimate is similar on other
GPUs. The numbers of prompt tokens are estimates too; the corrections compensate for their error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from router.domain.gpu import Gpu, GpuUuid
from router.domain.instance import InstanceSpec
from router.domain.model import BlobDigest, ModelFacts
from router.domain.residency import ResidencyKey
from router.scheduler.lru import put

STREAM_SHARE = 0.08
"""Ratio by which each further stream in a batch makes a step longer."""

_READ_SHARE = 0.8
"""Share of a GPU's bandwidth that a step reaches."""
_PROMPT_TOKENS_A_STEP = 30.0
"""Prompt tokens evaluated in the time of one step. Measured: 34 with an 8B on a 3090, 23 with a 70B on two."""
_PROMPT_TOKENS_A_STEP_CPU = 2.0
_UNKNOWN_GPU_BYTES_PER_SECOND = 5e11
_CPU_BYTES_PER_SECOND = 4e10
_STEP_SECONDS_MIN = 1e-4
_NEW_SHARE = 0.2
"""Weight of the newest request in the running mean."""
_SLOWDOWN_MAX = 4.0
"""Limit on the measured slowdown of a single request, so that an outlier counts little."""
_SECONDS_MIN, _SECONDS_MAX = 1e-7, 100.0
"""Limits of both figures."""
_KNOWN_MAX = 1_000


@dataclass(slots=True)
class Throughput:
    """Speed of a replica, or, for a model, the factors by which it is slower than estimated. Mutable."""

    prompt_seconds: float
    """Per token of a prompt."""
    step_seconds: float
    """Per generated token of a single stream."""


def guessed(weights_bytes: int, bandwidths: Sequence[float | None]) -> Throughput:
    """Estimated speed. `bandwidths`: bytes per second of the GPUs that share the layers; empty: the CPU is used."""
    rates = [rate or _UNKNOWN_GPU_BYTES_PER_SECOND for rate in bandwidths]
    mean = sum(rates) / len(rates) if rates else _CPU_BYTES_PER_SECOND
    step = max(_STEP_SECONDS_MIN, weights_bytes / (mean * _READ_SHARE))
    return Throughput(step / (_PROMPT_TOKENS_A_STEP if rates else _PROMPT_TOKENS_A_STEP_CPU), step)


def correction(expected_seconds: float, measured_seconds: float) -> float:
    """Factor to correct an estimated duration with, after one more request was measured."""
    slowdown = measured_seconds / expected_seconds if expected_seconds > 0.0 else 1.0
    return 1.0 + _NEW_SHARE * ((_SLOWDOWN_MAX if slowdown > _SLOWDOWN_MAX else slowdown) - 1.0)


class ThroughputModel:
    """Speeds of all replicas. Mutable, owned by `FleetState`; drops the oldest entries when there are too many."""

    __slots__ = ("_models", "known")

    def __init__(self) -> None:
        self.known: dict[ResidencyKey, Throughput] = {}
        """Cache of `throughput`, public for fast reads; has only replicas whose GPUs were all known."""
        self._models: dict[BlobDigest, Throughput] = {}

    def throughput(self, spec: InstanceSpec, model: ModelFacts, gpus: Mapping[GpuUuid, Gpu]) -> Throughput:
        """Speed of the model's replica on the instance."""
        cached = self.known.get((spec.name, model.blob))
        if cached is not None:
            return cached
        used = [gpus.get(uuid) for uuid in spec.gpus]
        throughput = guessed(model.weights_bytes, [gpu and gpu.bandwidth_bytes_per_second for gpu in used])
        factor = self._models.get(model.blob)
        if factor is not None:
            throughput.prompt_seconds *= factor.prompt_seconds
            throughput.step_seconds *= factor.step_seconds
        if None not in used:
            put(self.known, (spec.name, model.blob), throughput, _KNOWN_MAX)
        return throughput

    def correct(self, key: ResidencyKey, prompt: float, step: float) -> None:
        """Multiplies the figures of the replica and of its model by these factors."""
        replica, model = self.known.get(key), self._models.get(key[1])
        if model is None:
            model = Throughput(1.0, 1.0)
            put(self._models, key[1], model, _KNOWN_MAX)
        _multiply(model, prompt, step)
        if replica is not None:
            _multiply(replica, prompt, step)


def _multiply(throughput: Throughput, prompt: float, step: float) -> None:
    prompt *= throughput.prompt_seconds
    step *= throughput.step_seconds
    if _SECONDS_MIN < prompt < _SECONDS_MAX:
        throughput.prompt_seconds = prompt
    if _SECONDS_MIN < step < _SECONDS_MAX:
        throughput.step_seconds = step
