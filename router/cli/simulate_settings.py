"""What `simulate --config` and `--set` change: the scheduler's policy and the options of the simulated servers. Pure.

Only what differs from the defaults is applied, because the simulator has defaults of its own (a q8_0 cache, flash
attention): a run with `--set KEY=VALUE` differs from one without in that key only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from router.config.policy import policy_of
from router.config.settings import Settings
from router.domain.gpu import Gpu
from router.domain.instance import InstanceName, InstanceSpec
from router.domain.policy import Policy
from router.lab.simulator.loaded_model import ServerConfig

_TEMPLATE = InstanceSpec(InstanceName(""), (), "")
"""Stands for the instances on demand, which the simulator describes itself."""


def simulated_policy(settings: Settings, gpus: Sequence[Gpu]) -> Policy:
    """The simulator's policy with what the settings change.

    Raises:
        ConfigError: a rule names a GPU that is not simulated, or rules contradict each other.
    """
    configured, default = policy_of(settings, gpus, _TEMPLATE), policy_of(Settings(), gpus, _TEMPLATE)
    changed = {
        field.name: getattr(configured, field.name)
        for field in dataclasses.fields(Policy)
        if getattr(configured, field.name) != getattr(default, field.name)
    }
    return dataclasses.replace(Policy(), **changed)


def server_config(settings: Settings) -> ServerConfig:
    """The servers' options, of all policies, with those that the settings set."""
    ollama, given = settings.ollama, settings.ollama.model_fields_set
    config = ServerConfig()
    if "num_parallel" in given:
        config = dataclasses.replace(config, slots=ollama.num_parallel)
    if "context_length" in given:
        config = dataclasses.replace(config, context_length=ollama.context_length)
    if "kv_cache_type" in given:
        config = dataclasses.replace(config, kv_cache_type=ollama.kv_cache_type)
    if "flash_attention" in given and ollama.flash_attention is not None:
        config = dataclasses.replace(config, flash_attention=ollama.flash_attention)
    return config
