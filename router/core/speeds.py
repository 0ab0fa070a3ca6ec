"""How fast each copy of a model evaluates prompts and writes answers: guessed from its cards, then as it has shown.

A step of generation reads all weights once, so that the memory bandwidth of the cards says how long it takes; a prompt
is evaluated some tens of tokens in the time of one step. What requests have shown is kept as a factor on that guess, by
copy, and by model for copies that have shown nothing yet: what is wrong with the guess for a model on one card is
mostly wrong with it on the others. Tokens of prompts are those that the gateway guesses, here as everywhere: the factor
makes up for what is wrong with them too. It reads no clock and decides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from router.core.entities import BlobDigest, Gpu, GpuUuid, InstanceSpec, ModelFacts, ResidencyKey

STREAM_SHARE = 0.08
"""A further stream in a batch makes a step longer by so much."""

_READ_SHARE = 0.8
"""Of a card's bandwidth that a step reaches."""
_PROMPT_TOKENS_A_STEP = 30.0
"""Tokens of prompt that are evaluated in the time of one step: 34 with an 8B on a 3090, 23 with a 70B on two."""
_PROMPT_TOKENS_A_STEP_CPU = 2.0
_UNKNOWN_CARD_BYTES_PER_SECOND = 5e11
_CPU_BYTES_PER_SECOND = 4e10
_STEP_SECONDS_MIN = 1e-4
_NEW_SHARE = 0.2
"""Of the newest request in the mean of what requests have shown."""
_SURPRISE_MAX = 4.0
"""One request counts as no further than so many times from what was expected."""
_FACTOR_MAX = 50.0
_KNOWN_MAX = 1_000


class Pace(NamedTuple):
    """How fast a copy is; or, as `_Factors`, by how much it is slower than guessed."""

    prompt_seconds: float
    """For one token of a prompt."""
    step_seconds: float
    """For one token of one stream that is alone."""


_AS_GUESSED = Pace(1.0, 1.0)


def guessed(weights_bytes: int, bandwidths: Sequence[float | None]) -> Pace:
    """By the bandwidths of the cards that the layers lie on, one after the other; without cards: the CPU's."""
    rates = [rate or _UNKNOWN_CARD_BYTES_PER_SECOND for rate in bandwidths]
    mean = sum(rates) / len(rates) if rates else _CPU_BYTES_PER_SECOND
    step = max(_STEP_SECONDS_MIN, weights_bytes / (mean * _READ_SHARE))
    return Pace(step / (_PROMPT_TOKENS_A_STEP if rates else _PROMPT_TOKENS_A_STEP_CPU), step)


def follow(factor: float, expected_seconds: float, shown_seconds: float) -> float:
    """The factor after one more request, which was expected to take so long and took so long."""
    surprise = shown_seconds / max(1e-9, expected_seconds)
    surprise = max(1.0 / _SURPRISE_MAX, min(_SURPRISE_MAX, surprise))
    factor *= 1.0 + _NEW_SHARE * (surprise - 1.0)
    return max(1.0 / _FACTOR_MAX, min(_FACTOR_MAX, factor))


class Speeds:
    """Mutable, single owner; forgets what was learned longest ago where there is too much."""

    __slots__ = ("_factors", "_guesses")

    def __init__(self) -> None:
        self._factors: dict[ResidencyKey | BlobDigest, Pace] = {}
        self._guesses: dict[tuple[tuple[GpuUuid, ...], BlobDigest], Pace] = {}

    def pace(self, spec: InstanceSpec, model: ModelFacts, gpus: Mapping[GpuUuid, Gpu]) -> Pace:
        """Of the model's copy on that instance."""
        factors = self._factors
        factor = factors.get((spec.name, model.blob)) or factors.get(model.blob)
        guess = self._guesses.get((spec.gpus, model.blob)) or self._guess(spec, model, gpus)
        if factor is None:
            return guess
        return Pace(guess.prompt_seconds * factor.prompt_seconds, guess.step_seconds * factor.step_seconds)

    def _guess(self, spec: InstanceSpec, model: ModelFacts, gpus: Mapping[GpuUuid, Gpu]) -> Pace:
        cards = [gpus.get(uuid) for uuid in spec.gpus]
        guess = guessed(model.weights_bytes, [card and card.bandwidth_bytes_per_second for card in cards])
        if None not in cards:
            if len(self._guesses) >= _KNOWN_MAX:
                self._guesses.clear()
            self._guesses[spec.gpus, model.blob] = guess
        return guess

    def prompt_took(self, key: ResidencyKey, expected_seconds: float, shown_seconds: float) -> None:
        for known in (key, key[1]):
            before = self._factors.pop(known, _AS_GUESSED)
            self._keep(known, Pace(follow(before[0], expected_seconds, shown_seconds), before[1]))

    def steps_took(self, key: ResidencyKey, expected_seconds: float, shown_seconds: float) -> None:
        for known in (key, key[1]):
            before = self._factors.pop(known, _AS_GUESSED)
            self._keep(known, Pace(before[0], follow(before[1], expected_seconds, shown_seconds)))

    def _keep(self, known: ResidencyKey | BlobDigest, factor: Pace) -> None:
        self._factors[known] = factor
        if len(self._factors) > _KNOWN_MAX:
            del self._factors[next(iter(self._factors))]
