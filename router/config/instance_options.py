"""The options that one instance runs with.

Highest priority first: the instance's own keys, its environment variables, the variables for all instances, the keys
of `ollama`. A variable that Ollama obeys (`OLLAMA_NUM_PARALLEL`) changes how much memory a model needs, so the router
must read it too. Decides nothing else about an instance: neither its GPUs nor its port.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from router.config.schema import KV_CACHE_TYPES
from router.config.settings import ConfigError, InstanceSettings, Settings

_SLOTS = 32
"""Of a server with OpenAI's API, whose continuous batching serves about that many requests at once."""
_NOT_DECLARED = InstanceSettings(name="discovered")
_FALSE_TEXTS = frozenset({"0", "f", "F", "false", "FALSE", "False"})
"""What Go's `strconv.ParseBool` reads as false; Ollama takes any other text as true."""


@dataclass(frozen=True, slots=True)
class Tuning:
    """Effective options of one instance."""

    num_parallel: int
    context_length: int
    kv_cache_type: str
    flash_attention: bool | None
    """None: Ollama chooses."""
    environment: Mapping[str, str]
    """Its environment variables as configured, for an instance that the router starts."""


def tuning(settings: Settings, name: str, declared: InstanceSettings | None = None) -> Tuning:
    """The effective options of the instance with that name; `declared` is its entry in `instances`, if it has one.

    Raises:
        ConfigError: a variable has a value that Ollama would ignore with a warning.
    """
    instance = declared or _NOT_DECLARED
    variables = {**settings.ollama.env, **settings.ollama.instance_env.get(name, {}), **instance.env}
    if instance.url is not None:
        variables = {}  # another program started that server with its own environment
    values = _Variables(name, variables)
    if instance.kind != "ollama":
        return Tuning(instance.num_parallel or _SLOTS, instance.context_length or 0, "f16", None, {})
    parallel = instance.num_parallel or values.integer("OLLAMA_NUM_PARALLEL", 1) or settings.ollama.num_parallel
    context = instance.context_length or values.integer("OLLAMA_CONTEXT_LENGTH", 4) or settings.ollama.context_length
    cache = instance.kv_cache_type or values.kv_cache_type() or settings.ollama.kv_cache_type
    flash = _first(instance.flash_attention, values.flash_attention(), settings.ollama.flash_attention)
    if cache != "f16" and not flash:
        raise ConfigError(
            [f"instance {name}: kv_cache_type {cache} is ignored by Ollama without flash_attention: true"]
        )
    return Tuning(parallel, context, cache, flash, variables)


def _first(*values: bool | None) -> bool | None:
    return next((value for value in values if value is not None), None)


@dataclass(frozen=True, slots=True)
class _Variables:
    """The environment variables of an instance, parsed as Ollama parses them."""

    instance: str
    values: Mapping[str, str]

    def integer(self, variable: str, minimum: int) -> int | None:
        text = self._text(variable)
        if text is None:
            return None
        if not text.isascii() or not text.isdecimal() or int(text) < minimum:
            raise self._error(variable, text, f"must be a whole number of at least {minimum}")
        return int(text)

    def kv_cache_type(self) -> str | None:
        text = self._text("OLLAMA_KV_CACHE_TYPE")
        if text is not None and text not in KV_CACHE_TYPES:
            raise self._error("OLLAMA_KV_CACHE_TYPE", text, f"must be one of {', '.join(KV_CACHE_TYPES)}")
        return text

    def flash_attention(self) -> bool | None:
        text = self._text("OLLAMA_FLASH_ATTENTION")
        return None if text is None else text not in _FALSE_TEXTS

    def _text(self, variable: str) -> str | None:
        """The value without surrounding blanks and quotes, as Ollama strips them; None if it is then empty."""
        return self.values.get(variable, "").strip().strip("\"'") or None

    def _error(self, variable: str, text: str, requirement: str) -> ConfigError:
        return ConfigError([f"instance {self.instance}: {variable}={text!r} {requirement}"])


def tuning_problems(settings: Settings) -> list[str]:
    """Sentences about wrong variables of the instances that the configuration names."""
    declared = {instance.name: instance for instance in settings.instances if instance.name is not None}
    names = {**dict.fromkeys(settings.ollama.instance_env), **declared}
    problems: list[str] = []
    for name in names or {"gpu0": None}:
        try:
            tuning(settings, name, declared.get(name))
        except ConfigError as error:
            problems.extend(error.problems)
    return problems
