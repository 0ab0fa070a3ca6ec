"""Pins of models to GPUs that an operator sets while the router runs, over the rules of the configuration. Pure.

A pin is a model's GPUs by UUID; none of them means that the model is not pinned, whatever the configuration says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from router.config.schema import ModelSettings
from router.config.settings import Settings
from router.domain.model_names import ANY_MODEL, shortest
from router.domain.policy import Pin, Policy

RunTimePins = Mapping[str, tuple[str, ...]]
"""Shortest name of a model -> UUIDs of its GPUs."""


def with_pins(settings: Settings, pins: RunTimePins) -> Settings:
    """The settings as if the configuration had these pins. Only for placement: an added model has no other rules."""
    if not pins:
        return settings
    models = dict(settings.models)
    spellings = {shortest(name): name for name in models if name != ANY_MODEL}
    for name, gpus in pins.items():
        spelling = spellings.get(name, name)
        models[spelling] = models.get(spelling, ModelSettings()).model_copy(update={"gpus": gpus})
    return settings.model_copy(update={"models": models})


def still_needed(pins: RunTimePins, configured: Policy) -> RunTimePins:
    """Those that say something else than the configuration."""
    return {name: gpus for name, gpus in pins.items() if gpus != configured.pins.get(name, Pin()).gpus}


def marked(policy: Policy, pins: RunTimePins) -> Policy:
    """The policy made of `with_pins`, in which these pins are known as set at run time."""
    changed = {name: replace(policy.pins[name], is_run_time=True) for name in pins if name in policy.pins}
    return replace(policy, pins={**policy.pins, **changed})
