"""How fast each copy of a model evaluates prompts and writes answers: guessed from its GPUs, then as it has shown.

A step of generation reads all weights once, so that the memory bandwidth of the GPUs says how long it takes; a prompt
is evaluated some tens of tokens in the time of one step. What requests show corrects that, by copy, and by model for
copies that have shown nothing yet: what is wrong with the guess for a model on one GPU is mostly wrong with it on the
others. Tokens of prompts are those that the gateway guesses, here as everywhere: the correction makes up for what is
wrong with them too. It reads no clock and decides nothing.
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
"""A further stream in a batch makes a step longer by so much."""

_READ_SHARE = 0.8
"""Of a GPU's bandwidth that a step reaches."""
_PROMPT_TOKENS_A_STEP = 30.0
"""Tokens of prompt that are evaluated in the time of one step: 34 with an 8B on a 3090, 23 with a 70B on two."""
_PROMPT_TOKENS_A_STEP_CPU = 2.0
_UNKNOWN_GPU_BYTES_PER_SECOND = 5e11
_CPU_BYTES_PER_SECOND = 4e10
_STEP_SECONDS_MIN = 1e-4
_NEW_SHARE = 0.2
"""Of the newest request in the mean of what requests have shown."""
_SURPRISE_MAX = 4.0
"""One request counts as no slower than so many times what was expected."""
_LEAST, _MOST = 1e-7, 100.0
"""Whatever requests show, no pace leaves these."""
_KNOWN_MAX = 1_000


@dataclass(slots=True)
class Throughput:
    """How fast a copy is; mutable: what requests show corrects it. Of a model: how much slower it is than guessed."""

    prompt_seconds: float
    """For one token of a prompt."""
    step_seconds: float
    """For one token of one stream that is alone."""


def guessed(weights_bytes: int, bandwidths: Sequence[float | None]) -> Throughput:
    """By the bandwidths of the GPUs that the layers lie on, one after the other; without GPUs: the CPU's."""
    rates = [rate or _UNKNOWN_GPU_BYTES_PER_SECOND for rate in bandwidths]
    mean = sum(rates) / len(rates) if rates else _CPU_BYTES_PER_SECOND
    step = max(_STEP_SECONDS_MIN, weights_bytes / (mean * _READ_SHARE))
    return Throughput(step / (_PROMPT_TOKENS_A_STEP if rates else _PROMPT_TOKENS_A_STEP_CPU), step)


def correction(expected_seconds: float, shown_seconds: float) -> float:
    """By what the mean is to be multiplied after one more request, expected to take so long, took so long."""
    surprise = shown_seconds / expected_seconds if expected_seconds > 0.0 else 1.0
    return 1.0 + _NEW_SHARE * ((_SURPRISE_MAX if surprise > _SURPRISE_MAX else surprise) - 1.0)


class ThroughputModel:
    """Mutable, single owner; forgets what was first asked for longest ago where there is too much."""

    __slots__ = ("_models", "known")

    def __init__(self) -> None:
        self.known: dict[ResidencyKey, Throughput] = {}
        """Copies that were asked about while their GPUs were known, for who wants to read fast; else see `pace`."""
        self._models: dict[BlobDigest, Throughput] = {}

    def throughput(self, spec: InstanceSpec, model: ModelFacts, gpus: Mapping[GpuUuid, Gpu]) -> Throughput:
        """Of the model's copy on that instance."""
        known = self.known.get((spec.name, model.blob))
        if known is not None:
            return known
        found = [gpus.get(uuid) for uuid in spec.gpus]
        throughput = guessed(model.weights_bytes, [gpu and gpu.bandwidth_bytes_per_second for gpu in found])
        factor = self._models.get(model.blob)
        if factor is not None:
            throughput.prompt_seconds *= factor.prompt_seconds
            throughput.step_seconds *= factor.step_seconds
        if None not in found:
            put(self.known, (spec.name, model.blob), throughput, _KNOWN_MAX)
        return throughput

    def correct(self, key: ResidencyKey, prompt: float, step: float) -> None:
        """Multiplies what is known of the copy, and of its model, by these."""
        own, model = self.known.get(key), self._models.get(key[1])
        if model is None:
            model = Throughput(1.0, 1.0)
            put(self._models, key[1], model, _KNOWN_MAX)
        _multiply(model, prompt, step)
        if own is not None:
            _multiply(own, prompt, step)


def _multiply(throughput: Throughput, prompt: float, step: float) -> None:
    prompt *= throughput.prompt_seconds
    step *= throughput.step_seconds
    if _LEAST < prompt < _MOST:
        throughput.prompt_seconds = prompt
    if _LEAST < step < _MOST:
        throughput.step_seconds = step
