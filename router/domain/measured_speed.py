"""How fast a loaded model has proved to be."""

from __future__ import annotations

from typing import NamedTuple


class MeasuredSpeed(NamedTuple):
    """Speed for a single request, as its server reported it."""

    prompt_seconds: float
    """Per token of a prompt that is not cached."""
    step_seconds: float
    """Per generated token."""


UNUSABLE = MeasuredSpeed(float("inf"), float("inf"))
"""Of a model that could not be loaded or measured."""
